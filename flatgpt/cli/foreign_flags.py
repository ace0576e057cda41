"""Flags of nanoGPT, transformers and earlier versions: which of ours has the same meaning, or what to do instead."""

# {our key: flags with the same meaning}
_SAME = {
    "model_path": "init_from model",  # init_from of nanoGPT's sample.py; train.py has a key of that name
    "out_dir": "output_dir checkpoint_path",
    "resume": "resume_from_checkpoint load_checkpoint_path",
    # model
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "n_embed hidden_size",
    "context_length": "block_size n_positions n_ctx max_position_embeddings max_seq_length",
    "tie_weights": "tie_word_embeddings",
    "activation_checkpointing": "gradient_checkpointing",
    # training
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "grad_accum_steps": "gradient_accumulation_steps",  # of all devices, as in nanoGPT; in transformers, of each
    "max_iters": "max_steps",
    "epochs": "num_train_epochs",
    "warmup_iters": "warmup_steps",
    "warmup_fraction": "warmup_ratio",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "eps": "adam_epsilon",
    "grad_clip": "max_grad_norm",
    "deterministic": "full_determinism",
    "rank_timeout": "ddp_timeout",
    "log_interval": "logging_steps",
    "tracker": "report_to",
    "eval_interval": "eval_steps eval_intervel",
    "save_interval": "save_steps save_chkpt_epoch",
    "eval_batches": "eval_epochs",
    # generation
    "max_new_tokens": "max_tokens n_predict",
    "num_samples": "num_return_sequences",
    "temperature": "temp",
}
# {advice: flags, or flag=value}
_OTHERS = {
    "removed; precision, recall and F1 of the most likely token are always in the report, and --generate scores "
    "sampled text; leave it out": "sampled",
    # model
    "weights are random unless --init_from names a model; leave it out": "init_from=scratch",
    "use --init_from to train a model further, or --model_path to read it": "model_name_or_path",
    "use --dropout": "attn_pdrop embd_pdrop resid_pdrop",
    "use --activation gelu_tanh (gelu_new in transformers), gelu or relu": "activation_function",
    "use --mlp_ratio, the width as a multiple of n_embd": "n_inner",
    "use --attention flash or manual": "attn_implementation",
    "use --config, a recipe": "config_name",
    # data
    "prepare the text with prepare_data.py, then use --dataset": "dataset_name dataset_config_name train_file "
    "validation_file",
    "use --tokenizer of prepare_data.py, as a model has its dataset's tokenizer": "tokenizer_name",
    "use --seed, for initial weights, batch order and dropout": "data_seed",
    "batches are read from memory-mapped shards, in an order that --seed determines; leave it out": "group_by_length "
    "dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers "
    "dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor ignore_data_skip label_names "
    "length_column_name remove_unused_columns train_sampling_strategy",
    # optimizer
    "use --optimizer adamw or muon, with --beta1, --beta2 and --eps": "optim optim_args",
    "use --schedule, with --min_lr 0 to decay to 0 as transformers does": "lr_scheduler_type lr_scheduler_kwargs",
    "use --schedule constant for a constant learning rate": "decay_lr",
    "use --on_nonfinite stop or skip": "logging_nan_inf_filter",
    # devices and precision
    "use --device cpu": "use_cpu no_cuda",
    "use --dtype bfloat16, float16 or float32": "torch_dtype bf16 fp16",
    "use --dtype of eval.py": "bf16_full_eval fp16_full_eval",
    "use --compile": "torch_compile torch_compile_backend torch_compile_mode",
    "use --plan, which estimates the memory, and choose --batch_size": "auto_find_batch_size",
    "use --batch_size of eval.py; train.py chooses it": "per_device_eval_batch_size",
    "use --fsdp under torchrun": "deepspeed fsdp_config accelerator_config fsdp=full_shard",
    "start the script with torchrun --nproc_per_node=DEVICES": "local_rank parallelism_config",
    "ranks communicate through nccl on GPUs and gloo on CPUs; leave it out": "backend ddp_backend",
    # evaluation, log, files
    "use --resume to continue a run; eval.py and infer.py take --model_path out/RUN": "init_from=resume "
    "resume_from_checkpoint=true",
    "use --overwrite, which moves the old run aside": "overwrite_output_dir",
    "use python eval.py --model_path out/RUN": "eval_only",
    "use --eval_tokens N: tokens to score per evaluation, from the start of the split": "eval_iters",
    "train.py evaluates every --eval_interval updates, and eval.py scores a trained model; leave it out": "do_eval "
    "do_predict do_train eval_accumulation_steps eval_delay eval_on_start eval_strategy evaluation_strategy "
    "prediction_loss_only",
    "the best checkpoint and the newest --keep_checkpoints are kept; leave it out": "always_save_checkpoint "
    "enable_jit_checkpoint greater_is_better load_best_model_at_end metric_for_best_model save_on_each_node "
    "save_only_model save_strategy save_total_limit",
    "every --log_interval updates add a row to metrics.csv; leave it out": "disable_tqdm include_num_input_tokens_seen "
    "log_level log_level_replica log_on_each_node logging_dir logging_first_step logging_strategy skip_memory_metrics",
    "use --tracker wandb to log to Weights & Biases; otherwise leave it out": "wandb_log",
    "use --tracker trackio with the environment variable TRACKIO_SPACE_ID": "trackio_space_id",
    "use --wandb_project": "project",
    "use --out_dir out/NAME, as a run is named after its folder": "wandb_run_name run_name name",
    "use python export.py --push user/name after the training": "hub_always_push hub_model_id hub_private_repo "
    "hub_revision hub_strategy hub_token push_to_hub",
    # generation
    "use --prompt TEXT, or --prompt_file FILE": "start",
    "use --max_new_tokens, which does not count the prompt": "max_length",
    "use --stop, strings that end a text and are not printed": "stop_strings",
    "use --repetition_penalty, which counts all tokens": "repeat_penalty",
    "texts are sampled unless --greedy is given; leave it out": "do_sample",
    "no counterpart here; leave it out": "activation_checkpointing_kwargs average_tokens_across_devices "
    "batch_eval_metrics ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph debug "
    "eval_do_concat_batches eval_use_gather_object gradient_checkpointing_kwargs include_for_metrics jit_mode_eval "
    "label_smoothing_factor liger_kernel_config neftune_noise_alpha num_beams optim_target_modules "
    "restore_callback_states_from_checkpoint tf32 torch_empty_cache_steps trackio_bucket_id "
    "trackio_static_space_id use_cache use_liger_kernel",
}
ALIASES = {flag: key for key, flags in _SAME.items() for flag in flags.split()}
ADVICE = {flag: advice for advice, flags in _OTHERS.items() for flag in flags.split()}
