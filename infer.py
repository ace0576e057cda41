"""Let a model write: checkpoint + prompt -> text on standard output.

python infer.py --prompt "First Citizen:"               # the newest run
python infer.py --model_path out/shakespeare --prompt "ROMEO:" --max_new_tokens 300 --temperature 0.9 --top_k 50
python infer.py --prompt "def " --num_samples 3 --seed 7
"""

from cli import from_command_line, run_verb
from config import InferConfig, model_path

if __name__ == "__main__":
    CONFIG = from_command_line(InferConfig, __doc__)

import functools
import sys

import checkpoint
from runtime import machine
from sampling import generate, stream_text


def main(config: InferConfig) -> None:
    """Write num_samples texts, each from the prompt; what was chosen is said on standard error."""

    say = functools.partial(print, file=sys.stderr)
    place = machine(config.device, config.dtype)
    folder, state = checkpoint.find(model_path(config), say)
    model, encoding = checkpoint.load_model(folder, state, place.device)
    say(f"{folder}: {model.num_params():,} parameters, iter {state['iter']}, on {place.device}")
    prompt = encoding.encode_ordinary(config.prompt)
    if not prompt:  # a new document, where the data had marks between them; a new line, where it had none
        prompt = [encoding.eot_token] if state["data"]["end_of_text"] else encoding.encode_ordinary("\n")
    for n in range(config.num_samples):
        if config.num_samples > 1:
            print(f"--- sample {n + 1} of {config.num_samples}")
        with place.autocast():
            ids = generate(
                model,
                prompt,
                config.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                seed=config.seed + n,
                n_vocab=encoding.n_vocab,
                stop_ids=(encoding.eot_token,),
            )
            pieces = stream_text(ids, encoding)
            print(config.prompt, end="", flush=True)
            for piece in pieces if config.stream_text else ["".join(pieces)]:
                print(piece, end="", flush=True)
            print()


if __name__ == "__main__":
    run_verb(main, CONFIG)
