"""A short run of every training script on the same few images, for what all of them share."""

from pathlib import Path

from tests.scripts import test_fine_tune, test_textual_inversion, test_train_db, test_train_network
from tests.scripts.runs import write_dataset

SCRIPTS = ("train_network", "train_db", "fine_tune", "train_textual_inversion", "train_textual_inversion_XTI")
RESULT = "thing.safetensors"


def method_arguments(script: str, model: Path, folder: Path, *, batch_size: int = 2, steps: int = 2) -> list[str]:
    """Arguments of ``script``, which writes :data:`RESULT`; ``model`` has SD's 16 cross-attention blocks."""
    if script == "train_network":
        given = test_train_network.arguments(model, write_dataset(folder, batch_size=batch_size), steps=steps)
    elif script == "train_db":
        given = test_train_db.arguments(model, write_dataset(folder, batch_size=batch_size), steps=steps)
    elif script == "fine_tune":
        config = test_fine_tune.write_described(folder, batch_size=batch_size)
        given = test_fine_tune.arguments(model, config, steps=steps)
    else:
        config = test_textual_inversion.dataset(folder, batch_size=batch_size)
        given = test_textual_inversion.arguments(model, config, "--use_object_template", steps=steps)
    return [*given, "--output_name=thing", "--save_model_as=safetensors"]
