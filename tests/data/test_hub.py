"""Datasets are downloaded from the hub with their revision, and a refusal of the hub is reported."""

from fnmatch import fnmatch

import pytest

from tests.source_rows import write_lines, write_rows
from utils.data.sources import TREE_LAYOUTS, open_source

ROWS = [{"prompt": f"Q{i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(5)]
PAIR = ROWS[0]


def read(source, role="train"):
    return list(source.splits[role]())


def fails(dataset, match):
    """Check that opening the dataset stops with one line that matches, and return it."""
    with pytest.raises(SystemExit, match=match) as stop:
        open_source(dataset, "average")
    assert "\n" not in str(stop.value)
    return str(stop.value)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Replace the hub by a folder named like a commit. Return (folder, calls, {"error": what to raise})."""
    import huggingface_hub

    folder = tmp_path / "snapshots" / ("c0ffee" * 7)[:40]
    folder.mkdir(parents=True)
    calls, answer = [], {"error": None}

    def snapshot_download(name, **options):
        calls.append((name, options))
        if answer["error"]:
            raise answer["error"]
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return folder, calls, answer


def test_a_hub_dataset_is_read_with_its_revision(hub):
    folder, calls, _ = hub
    write_lines(folder / "train.jsonl.gz", ROWS[:4])
    write_lines(folder / "validation.jsonl.gz", ROWS[4:])
    write_lines(folder / "preference" / "preference.jsonl.gz", [PAIR])
    source = open_source("nvidia/HelpSteer2.v1-b", "average")
    assert source.name == "nvidia/HelpSteer2.v1-b" and source.revision == folder.name
    assert read(source) == ROWS[:4] and read(source, "test") == ROWS[4:]
    assert calls[0][0] == "nvidia/HelpSteer2.v1-b" and calls[0][1]["repo_type"] == "dataset"
    assert "token" not in calls[0][1], "the token comes from the environment, through the hub's own library"


def test_a_folder_or_a_split_of_a_hub_dataset_is_read(hub):
    folder, _, _ = hub
    write_lines(folder / "train.jsonl", ROWS)
    write_lines(folder / "goodness_split.jsonl", [PAIR])
    write_lines(folder / "preference" / "train.jsonl", [{**PAIR, "prompt": "in the folder"}])
    assert read(open_source("owner/name/preference", "average"))[0]["prompt"] == "in the folder"
    source = open_source("owner/name/goodness_split", "average")
    assert read(source) == [PAIR] and source.split_used == {"train": "goodness_split"} and source.revision
    fails("owner/name/prefrence", "no folder or split 'prefrence' there, splits: goodness_split, train")


def test_a_dataset_without_a_train_split_lists_its_folders_and_splits(hub):
    folder, _, _ = hub
    write_lines(folder / "helpful-base" / "train.jsonl.gz", ROWS)
    fails("Anthropic/hh-rlhf", "files in folders, choose one: Anthropic/hh-rlhf/helpful-base$")
    assert read(open_source("Anthropic/hh-rlhf/helpful-base", "average")) == ROWS
    write_lines(folder / "one.jsonl", ROWS)
    write_lines(folder / "two.jsonl", ROWS)
    fails("owner/name", "no split for RATING = 'average', it has: one, two; choose one: owner/name/one$")
    assert open_source("owner/name/one", "average").split_used == {"train": "one"}


def test_message_trees_are_read_from_tables_and_not_from_the_exports(hub):
    folder, calls, _ = hub
    (folder / "data").mkdir()
    message = {"message_id": "1", "parent_id": None, "role": "prompter", "text": "Q"}
    write_rows(folder / "data" / "train-00000-of-00001-b42a.parquet", [{**message, "text": "of the table"}])
    write_rows(folder / "data" / "validation-00000-of-00001-134b.parquet", [message])
    write_lines(folder / "2023-04-12_oasst_all.messages.jsonl.gz", [message])
    write_lines(folder / "2023-04-12_oasst_all.trees.jsonl.gz", [{"message_tree_id": "1", "prompt": message}])
    source = open_source("OpenAssistant/oasst1", "", TREE_LAYOUTS)
    assert source.split_used == {"train": "train", "test": "validation"}
    assert read(source) == [{**message, "text": "of the table"}] and source.layouts["train"] == "messages"
    names = ("2023-04-12_oasst_all.messages.jsonl.gz", "2023-04-12_oasst_all.trees.jsonl.gz")
    assert all(any(fnmatch(name, pattern) for pattern in calls[0][1]["ignore_patterns"]) for name in names)
    assert not any(fnmatch("data/train-00000.parquet", pattern) for pattern in calls[0][1]["ignore_patterns"])
    source = open_source("OpenAssistant/oasst1/2023-04-12_oasst_all.trees", "", TREE_LAYOUTS)
    assert source.layouts == {"train": "trees"} and not calls[1][1]["ignore_patterns"], "asked for by name"


def test_a_local_folder_is_read_instead_of_the_hub(hub, tmp_path):
    _, calls, _ = hub
    write_lines(tmp_path / "nvidia" / "HelpSteer2" / "train.jsonl", ROWS)
    assert read(open_source("nvidia/HelpSteer2", "average")) == ROWS and not calls


def test_a_refusal_of_the_hub_is_reported_without_tokens(hub):
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    def refusal(kind):
        error = kind.__new__(kind)
        error.args = ("401 Client Error\nfor hf_secret",)
        return error

    _, _, answer = hub
    for error, match in [
        (refusal(RepositoryNotFoundError), "'nvidia/HelpSter2' is not on the hub .*check the spelling"),
        (refusal(GatedRepoError), "is gated: accept its terms on the hub and set HF_TOKEN in the environment"),
        (refusal(LocalEntryNotFoundError), "hub cannot be reached and the cache has no complete copy"),
        (TimeoutError("timed out"), "hub cannot be reached"),
        (type("ConnectError", (Exception,), {})("no route"), "hub cannot be reached .*ConnectError"),
    ]:
        answer["error"] = error
        assert "hf_secret" not in fails("nvidia/HelpSter2", match)
    answer["error"] = OSError(28, "No space left on device")  # no refusal: the script reports a full disk
    with pytest.raises(OSError, match="No space left"):
        open_source("nvidia/HelpSteer2", "average")


def test_a_dataset_that_is_neither_on_the_hub_nor_cached_is_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    fails("nvidia/no_such_dataset_here", "hub cannot be reached and the cache has no complete copy")
