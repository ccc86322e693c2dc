"""What can be had of the hub, from its cache on this disk or by asking it."""

import threading
import time
from pathlib import Path

REASONS = {  # errors of the hub's library in a user's words
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
    "HFValidationError": "neither a folder here nor a hub name",
    "RepositoryNotFoundError": "the hub has no such name (or it is private: set HF_TOKEN)",
}


def in_cache(name: str, kind: str) -> bool:
    """Whether the hub's cache on this disk holds weights (kind "model") or rows ("dataset") of that name."""
    from huggingface_hub import constants

    repository = "--".join([f"{kind}s", *name.split("/")[:2]])  # a dataset's name may go on: owner/name/folder
    wanted = ("*.safetensors", "*.bin") if kind == "model" else ("*.parquet", "*.jsonl*", "*.csv")
    snapshots = Path(constants.HF_HUB_CACHE) / repository / "snapshots"
    return any(file.exists() for pattern in wanted for file in snapshots.rglob(pattern))  # not a link to nowhere


def ask_hub(names: dict[str, str], timeout: float) -> dict[str, str]:
    """{kind: "" or why the hub does not give it, without addresses and tokens}, in `timeout` seconds in all."""
    from huggingface_hub import HfApi

    found = {kind: f"the hub did not answer within {timeout:g} s" for kind in names}

    def ask(kind: str) -> None:
        try:
            HfApi().repo_info("/".join(names[kind].split("/")[:2]), repo_type=kind, timeout=timeout)
            found[kind] = ""
        except Exception as error:  # whatever the network throws, the answer is that it cannot be had
            found[kind] = REASONS.get(type(error).__name__, f"the hub is not reachable ({type(error).__name__})")

    # a thread for each, since no timeout of the library covers the name look-up
    threads = [threading.Thread(target=ask, args=(kind,), daemon=True) for kind in names]
    until = time.monotonic() + timeout
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return dict(found)
