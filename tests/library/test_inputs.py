"""What is checked before anything heavy is imported, where model and data meet."""

import pytest

from library.inputs import check_data
from library.options import parse_options
from tests.library.data.reading import make_images
from train_network import Options


def findings(tmp_path, *flags):
    make_images(tmp_path / "train" / "1_dog", size=(512, 512))
    given = [f"--train_data_dir={tmp_path / 'train'}", "--enable_bucket", *flags]
    options = parse_options(Options, given, prog="test", description="", announce=lambda _: None)
    return [finding for finding in check_data(options).findings if "v-prediction" in finding.what]


@pytest.mark.parametrize("resolution", ["512", "640,384"])
def test_the_usual_size_of_sd2_is_suggested_where_that_of_sd1_is_left(tmp_path, resolution):
    (finding,) = findings(tmp_path, "--v2", "--v_parameterization", f"--resolution={resolution}")
    assert finding.severity == "warning"
    assert "768" in finding.remedy


@pytest.mark.parametrize(
    "flags", [("--resolution=512",), ("--v2", "--resolution=512"), ("--v2", "--v_parameterization", "--resolution=768")]
)
def test_other_models_and_sizes_have_no_such_remark(tmp_path, flags):
    assert not findings(tmp_path, *flags)
