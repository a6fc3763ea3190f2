"""The files that a model consists of as far as loading reads them, for telling later whether it is the same model."""

from pathlib import Path

from library.models import hub
from library.models.detect import PARTS, describe_vae, local_path, vae_folder, weight_file
from library.models.recognise import MODEL_FLAG


def model_files(source: str) -> dict[str, Path]:
    """The files of the base model at ``source``, a path or a hub id, by their names in it."""
    path = local_path(source, MODEL_FLAG) or hub.downloaded(source, hub.model_files)
    if path is None or path.is_file():
        return {} if path is None else {path.name: path}
    found = [path / "scheduler" / "scheduler_config.json"]
    for part in PARTS:
        found += [path / part / "config.json", weight_file(path / part, part)]
    found += sorted(file for file in path.glob("tokenizer/*") if file.suffix in (".json", ".txt"))
    return {file.relative_to(path).as_posix(): file for file in found if file.is_file()}


def vae_files(source: str) -> dict[str, Path]:
    """The same for a VAE that replaces the model's own."""
    path = describe_vae(source) or hub.downloaded(source, hub.vae_files)
    if path is None or path.is_file():
        return {} if path is None else {path.name: path}
    folder = vae_folder(path)
    return {file.name: file for file in (folder / "config.json", weight_file(folder, "vae")) if file.is_file()}
