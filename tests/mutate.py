"""Break the product on purpose, one line at a time, and list the changes that no test notices. Run by hand, minutes.

python tests/mutate.py                               # all of them; exit code 1 where one survives or is stale
python tests/mutate.py --only best --only secrets    # some of them
python tests/mutate.py --list

Each change is made in a copy of the tracked files, as the working tree has them. The tests that it names have to pass
without it. With it, it is killed if one fails, survived if all pass or are skipped, broken if they hang or cannot be
collected, stale if its old text does not occur exactly once in its file.
"""

import argparse
import contextlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600  # seconds for the tests of one change, against hanging

# A change: file, name and the promise that it breaks / - old text / + new text / the tests that notice it.
TABLE = r"""
train.py save-first: a checkpoint is saved before the evaluation and the sample of its iteration
- if i > 0 and saved != i and (evaluating or asked
+ if i > 0 and saved != i and (asked
  test_promises.py::test_failed_evaluation_or_sample_leaves_the_checkpoint_before_it
train.py best: `best` leads to the checkpoint with the lowest validation loss
- better = progress["best_loss"] is None or loss < progress["best_loss"]
+ better = True
  test_train.py::test_best_is_the_best_and_stays
saver.py best-arrived: what comes after a save is left out where the save failed
- self._submit(lambda: self._arrived and work(*args))
+ self._submit(lambda: work(*args))
  test_saver.py::test_what_would_come_after_a_failed_save_is_left_out
train.py best-saved: a loss whose checkpoint could not be saved is not the best
- if saved == i and better and ranks.all(saver.failure is None):
+ if saved == i and better:
  test_promises.py::test_best_is_none_whose_save_failed
train.py rows-due: updates have a row in the log where one is due, evaluated or saved
- due = any(i % n == 0 for n in intervals)
+ due = i % config.log_interval == 0
  test_resume.py::test_run_that_was_stopped_anywhere_ends_as_the_undisturbed_one
train.py row-figures: a row of the log has the figures of its update
- "lr": learning_rate(i - 1, run.config),
+ "lr": learning_rate(i, run.config),
  test_promises.py::test_row_of_the_log_has_the_figures_of_its_update
train.py finite-weights: weights that are not finite are not saved
- require_finite(run.model, row["iter"])
+ pass
  test_promises.py::test_weight_that_is_not_finite_is_never_saved
train.py finished: a run says that it is finished at its end, and not before
- state["finished"] = False
+ state["finished"] = True
  test_train.py::test_max_minutes_ends_a_run_in_peace
train.py patience: a run ends after so many evaluations without a new best
- progress["since_best"] >= config.patience
+ progress["since_best"] > config.patience
  test_train.py::test_patience_ends_a_run_that_gets_no_better
train.py max-minutes: each slot of time makes an update at least
- cut = stop.asked if i > at.row["iter"] else lambda: stop.signal or 0
+ cut = stop.asked
  test_train.py::test_each_slot_of_time_makes_an_update
train.py dropout-masks: dropout masks are those of (seed, update, micro-batch)
- reseed(config.seed, i, micro)
+ reseed(config.seed, micro)
  test_promises.py::test_each_micro_batch_of_each_update_has_dropout_masks_of_its_own
train.py sample-noise: the samples of all evaluations are drawn with the same noise
- samples.draw(run, config.seed)
+ samples.draw(run, config.seed + i)
  test_promises.py::test_samples_of_all_evaluations_have_the_same_noise
train.py moved-run: a run whose folder was moved away writes nothing into what came in its place
- saver = Saver(config, ranks.first, full_tensor, claim.held)
+ saver = Saver(config, ranks.first, full_tensor)
  test_promises.py::test_nothing_is_written_into_what_came_in_the_place_of_a_moved_run
train.py room: room for a checkpoint is looked for after the first update
- saver.reserve(parts(run, row, progress))
+ pass
  test_promises.py::test_room_for_a_checkpoint_is_looked_for_after_the_first_update
train.py first-update: ranks wait twice as long for each other in the first update
- shorten_timeout(config)
+ pass
  test_promises.py::test_ranks_wait_twice_as_long_in_the_first_update
run.py initial-weights: ranks that begin with other weights are refused
- ranks.require_alike({"initial weights": [
+ list({"initial weights": [
  test_promises.py::test_ranks_that_would_not_train_alike_are_refused
run.py shards-checked: a shard that is not as it was written is an error before the first update
- work.result()
+ work.exception()
  test_promises.py::test_shards_are_checked_before_the_first_update
run.py verify-data: --verify_data compares every shard's SHA-256
- dataset.check, config.verify_data)
+ dataset.check, False)
  test_promises.py::test_verify_data_finds_what_only_the_hash_shows
run.py plan: train.py --plan prints what follows from the config
- tokens = len(dataset.tokens("train"))
+ tokens = len(dataset.tokens("val"))
  test_promises.py::test_plan_prints_what_follows_from_the_config_and_trains_nothing
throughput.py bench-data: the figures of bench.py data fit each other and the text
- figures[f"{way}_tokens_per_s"] = tokens / seconds
+ figures[f"{way}_tokens_per_s"] = size / seconds
  test_promises.py::test_figures_of_preparation
resume.py resume-other-run: --resume with another seed is an error
- FIXED = ("stride", "seed", "optimizer")
+ FIXED = ("stride", "optimizer")
  test_resume.py::test_each_alone_is_an_error
resume.py secrets: a key in the environment is masked in the command line that state.json keeps
- command = command.replace(value, f"${name}")
+ pass
  test_resume.py::test_key_in_a_setting_is_masked_in_the_command_and_kept_as_a_setting
checkpoint.py checkpoint-flushed: a checkpoint has its name when all of it is on the disk
- for writing in (*files, "."):
+ for writing in files:
  test_promises.py::test_checkpoint_has_its_name_when_all_of_it_is_on_the_disk
checkpoint.py checkpoint-verified: a file that is not what was written is named, and the checkpoint before it used
- if _fingerprint(folder / name) != state["files"].get(name):
+ if not (folder / name).is_file():
  test_checkpoint.py::test_damage_is_noticed_and_the_one_before_it_is_used
checkpoint.py checkpoint-pickle: nothing in a train_state.pt is executed
- map_location="cpu", weights_only=True
+ map_location="cpu", weights_only=False
  test_checkpoint.py::test_planted_pickle_does_not_run
saver.py saved-copy: what is saved is what was there when the save began
- return buffer.copy_(value, non_blocking=True)
+ return value
  test_saver.py::test_saved_is_what_was_there_at_the_time
claim.py lock: one process at a time trains in a run's folder
- _lock(self._file)
+ pass
  test_claim.py::test_of_two_that_find_no_folder_one_gets_it
claim.py overwrite: --overwrite moves the run that is there away, and deletes nothing
- os.rename(folder, old)
+ __import__("shutil").rmtree(folder)
  test_train.py::test_overwrite_deletes_nothing
optim.py nonfinite: an update with nan or inf is not applied
- optimizer.found_inf = left_out
+ optimizer.found_inf = 0 * left_out
  test_health.py::test_bad_update_leaves_no_trace
optim.py lr-warm-up: the warm-up begins above zero and meets lr at update warmup_iters
- return config.lr * (update + 1) / (warmup + 1)
+ return config.lr * update / warmup
  test_optim.py::test_learning_rate
optim.py weight-decay: vectors do not decay
- "weight_decay": 0.0}]
+ "weight_decay": weight_decay}]
  test_optim.py::test_exactly_the_matrices_decay
dataset.py epoch-order: each epoch has an order of its own
- Shuffle(W, self.seed, epoch)
+ Shuffle(W, self.seed, 0)
  test_dataset.py::test_order_depends_on_seed_and_epoch_alone
metrics.py validation-sum: losses and tokens are summed over ranks before they are divided
- sums = total(torch.tensor([loss_sum, tokens], dtype=torch.float64))
+ sums = total(torch.tensor([loss_sum / tokens, 1], dtype=torch.float64))
  test_ranks.py::test_scores_are_summed_over_ranks
tasks.py split: the split of a document is a hash of its text alone
- hashlib.blake2b(text.encode(), digest_size=8, key=b"flatgpt split")
+ hashlib.blake2b(text[1:].encode(), digest_size=8, key=b"flatgpt split")
  test_tasks.py::test_choice_never_changes
tokenizer.py end-of-text: each document ends with end-of-text, where the source says so
- parts += [np.frombuffer(text.encode(), dtype=np.uint8), eot]
+ parts += [np.frombuffer(text.encode(), dtype=np.uint8)]
  test_tokenizer.py::test_documents_do_not_run_into_each_other
tokenizer.py id-range: ids beyond the vocabulary are never written
- assert ids.size == 0 or (ids.min() >= 0 and ids.max() < n_vocab)
+ assert ids.size == 0 or (ids.min() >= 0 and ids.max() <= n_vocab)
  test_tokenizer.py::test_narrow_refuses_ids_beyond_the_vocabulary
tokenizer.py tokenizer-cuts: a long text is cut only where no id changes
- _BREAK = re.compile(r"\S(?=[ \n])")
+ _BREAK = re.compile(r"\S(?=[ \na])")
  test_tokenizer.py::test_long_run_is_cut_and_comes_back test_tokenizer.py::test_real_text
shards.py shard-flushed: a shard has its name when it is on the disk
- self.flush()
+ pass
  test_shards.py::test_nothing_has_its_name_before_it_is_on_the_disk
preparation.py meta-last: a dataset that was stopped is not taken for a finished one
- entries = run()
+ write_meta(folder, settings); entries = run()
  test_preparation.py::test_stopped_at_any_task_it_goes_on_from_there
shards.py shard-size: a shard that is too long is an error
- if count is not None and size != 2 * count:
+ if count is not None and size < 2 * count:
  test_shards.py::test_changed_shard_is_named
sampling.py top-k: top_k keeps exactly the k likeliest
- return logits.masked_fill(logits < kth, -torch.inf)
+ return logits.masked_fill(logits <= kth, -torch.inf)
  test_sampling.py::test_top_k_keeps_exactly_the_likeliest
sampling.py top-p: top_p keeps the token that reaches it
- before = largest.cumsum(-1) - largest
+ before = largest.cumsum(-1)
  test_sampling.py::test_top_p_keeps_the_likeliest_that_reach_it
sampling.py temperature: tokens are drawn by softmax of logits over temperature
- logits = logits / options.heat
+ logits = logits * options.heat
  test_sampling.py::test_frequencies_follow_softmax_of_logits_over_temperature
sampling.py row-noise: each row draws from a generator of its own, of the seed and its number
- seed_of(options.seed, row)
+ seed_of(options.seed, 0)
  test_sampling.py::test_samples_of_a_prompt_differ_and_are_found_again_by_their_number
sampling.py full-context: the newer half of a full context is kept
- kept = texts[row][-max(1, context // 2) :]
+ kept = texts[row][: max(1, context // 2)]
  test_sampling.py::test_greedy_equals_a_loop_without_a_cache
sampling.py stop-strings: a stop string is not given out
- self._held[: min(found)[1]], "", True
+ self._held[: min(found)[0]], "", True
  test_sampling.py::test_stop_strings_end_the_text_however_it_is_cut
report.py bits-per-byte: bits per byte are the losses in bits, over the bytes of the text
- scores.loss_sum / math.log(2) / counts.bytes
+ scores.loss_sum / counts.bytes
  test_report.py::test_figures_by_hand
formats.py export-transposed: exported matrices lie as transformers has them
- answer[name] = (tensor.T if name.endswith(CONV1D) else tensor).contiguous()
+ answer[name] = tensor.contiguous()
  test_export.py::test_logits_equal_ours
formats.py export-tied: an exported tied head is the embedding
- "tie_word_embeddings": config.tie_weights
+ "tie_word_embeddings": not config.tie_weights
  test_export.py::test_logits_equal_ours
cli.py precedence: the command line counts more than the recipe
- for layer in [*layers, typed]:
+ for layer in [typed, *layers]:
  test_cli.py::test_each_level_overrides_the_one_before
cli.py exit-code: a mistake is one error line, and exit code 2
- print(f"error: {error}", file=sys.stderr, flush=True)
+ sys.exit(print(f"error: {error}", file=sys.stderr, flush=True))
  test_cli.py::test_run_ends_a_verb
runlog.py columns: metrics.csv has the columns that it always had
- "peak_mem_gb",
+ "peak_memory_gb",
  test_runlog.py::test_columns_keep_their_names_and_order
"""


class Mutation(NamedTuple):
    """One change of one line; see TABLE."""

    file: str
    name: str
    promise: str
    old: str
    new: str
    tests: list[str]


def read_table() -> list[Mutation]:
    """The changes of TABLE."""
    pattern = r"^(\S+) (\S+): (.+)\n- (.+)\n\+ (.+)\n((?:  .+\n)+)"
    found = [
        Mutation(*groups[:5], [f"tests/{test}" for test in groups[5].split()])
        for groups in re.findall(pattern, TABLE, re.M)
    ]
    assert len(found) == TABLE.count("\n- ")
    return found


def copy_repository(folder: Path) -> Path:
    """Copy the tracked files, as they are in the working tree."""
    names = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def run_tests(folder: Path, tests: list[str]) -> tuple[int | None, str]:
    """Run tests in a copy; pytest's exit code, None where it took too long, and its output."""
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "", "-rfEs", "-p", "no:cacheprovider", *tests]
    # no bytecode: two changes of a file within a second are not told apart
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(folder.parent)}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(words, cwd=folder, env=env, text=True, start_new_session=True, **streams)
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def try_mutation(mutation: Mutation, folder: Path) -> tuple[str, str]:
    """Make the change in a copy, run its tests and undo it; the verdict, and what there is to say of it."""
    path = folder / mutation.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text.count(mutation.old) != 1:
        return "stale", f"{mutation.file} has its old text {text.count(mutation.old)} times"
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        code, output = run_tests(folder, mutation.tests)
    finally:
        path.write_text(text, encoding="utf-8")
    if code == 1:
        return "killed", "; ".join(re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", output, re.M)[:1])
    if code == 0:
        return "survived", mutation.promise
    return "broken", "its tests hang" if code is None else f"pytest ends with {code}: {output[-500:]}"


def main() -> int:
    """Try the changes; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="try this change; may be given several times")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="changes to try at once")
    parser.add_argument("--list", action="store_true", help="print names and promises")
    options = parser.parse_args()
    table = read_table()
    if unknown := set(options.only or ()) - {mutation.name for mutation in table}:
        parser.error(f"no such change: {', '.join(sorted(unknown))}")
    chosen = [mutation for mutation in table if not options.only or mutation.name in options.only]
    if options.list:
        print("\n".join(f"{mutation.name:<22} {mutation.promise}" for mutation in chosen))
        return 0
    with tempfile.TemporaryDirectory(prefix="mutate_") as temporary:
        copies: queue.Queue[Path] = queue.Queue()
        for number in range(min(options.jobs, len(chosen))):
            copies.put(copy_repository(Path(temporary, str(number), "copy")))
        tests = sorted({test for mutation in chosen for test in mutation.tests})
        code, output = run_tests(Path(temporary, "0", "copy"), tests)
        if code != 0 or re.search(r"^SKIPPED ", output, re.M):
            print(output, "error: these tests have to pass, and none may be skipped, without any change", sep="\n")
            return 1

        def one(mutation: Mutation) -> str:
            folder, began = copies.get(), time.monotonic()
            verdict, said = try_mutation(mutation, folder)
            copies.put(folder)
            print(f"{verdict:<9}{mutation.name:<22}{time.monotonic() - began:5.0f} s  {said}", flush=True)
            return verdict

        with ThreadPoolExecutor(copies.qsize()) as pool:
            verdicts = list(pool.map(one, chosen))
    counts = {verdict: verdicts.count(verdict) for verdict in ("killed", "survived", "broken", "stale")}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return int(counts["killed"] < len(verdicts))


if __name__ == "__main__":
    sys.exit(main())
