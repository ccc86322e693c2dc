"""What runs of preference training are called: project, run, folder."""

import re
import sys
from pathlib import Path

from utils.files import read_json
from utils.processed import made_again

DATASETS = (("helpsteer", "HelpSteer"), ("ultrafeedback", "UFB"), ("oasst", "OASST"))  # in a dataset's name: short

MODES = {"none": "Plain", "text": "Text", "embedding": "Emb"}  # what GUIDANCE may name: what runs are called by it


def short_dataset(name: str) -> str:
    """HelpSteer, UFB, OASST or Custom, by the dataset_name of the metadata."""
    name = Path(name).name if Path(name).exists() else name  # of a local file not the folders above it
    return next((short for part, short in DATASETS if part in name.lower()), "Custom")


def short_model(name: str) -> str:
    """A model's name without owner and -Instruct; DeepSeek-R1-Distill-Qwen-1.5B becomes DeepSeek-R1-Qwen1.5B."""
    short = Path(name.rstrip("/")).name
    short = re.sub(r"-[Ii]nstruct\b", "", short)
    return re.sub(r"-Distill-([A-Za-z]+)-(\d)", r"-\1\2", short)


def run_names(dataset: str, mode: str, model: str, loss: str, beta: float, alpha: float) -> tuple[str, str]:
    """(project, run): HelpSteer_dpo_Text and HelpSteer-Text-Qwen2.5-1.5B-dpo-beta0.1-alpha0.1.

    dataset: dataset_name of the metadata. mode: Plain, Text or Emb. model: as it is to be called.
    """
    run = f"{short_dataset(dataset)}-{mode}-{model}-{loss}-beta{beta:g}-alpha{alpha:g}"
    return f"HelpSteer_{loss}_{mode}", run


def main(words: list[str]) -> None:
    """Print project and run for DATA_DIR, GUIDANCE, MODEL_SHORT_NAME, MODEL, LOSS, BETA, ALPHA: for shell scripts.

    On stderr, where the rows were made for a model of another name: the command to run first if its tokenizer is
    another one too, which only training can tell.
    """
    data_dir, guidance, short, model, loss, beta, alpha = words
    metadata = read_json(Path(data_dir) / "metadata.json")
    mode, name = MODES[guidance], short or short_model(model)
    print(*run_names(metadata["dataset_name"], mode, name, loss, float(beta), float(alpha)))
    if metadata["tokenizer"] != model:
        first = made_again(metadata, data_dir, model)
        print(
            f"{data_dir} has the tokens of {metadata['tokenizer']}; if {model} has others, run `{first}` first",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
