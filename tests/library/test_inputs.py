"""What is checked before anything heavy is imported, where model and data meet."""

import pytest

from library.inputs import check_data, check_inputs
from library.options import parse_options
from tests.library.data.reading import make_images
from tests.tiny import tiny_sd
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


@pytest.mark.parametrize(("flags", "told"), [((), True), (("--reg_data_dir={}/reg",), False)])
def test_a_weight_of_images_that_are_not_there_is_told(tmp_path, caplog, flags, told):
    make_images(tmp_path / "train" / "1_dog")
    make_images(tmp_path / "reg" / "1_dog")
    given = [f"--train_data_dir={tmp_path / 'train'}", "--prior_loss_weight=0.5", "--network_module=networks.lora"]
    given += [f"--pretrained_model_name_or_path={tiny_sd(tmp_path / 'model')}", f"--output_dir={tmp_path / 'out'}"]
    given += ["--enable_bucket", "--resolution=512", *(flag.format(tmp_path) for flag in flags)]
    check_inputs(parse_options(Options, given, prog="test", description="", announce=lambda _: None))
    assert ("without effect without regularisation images: --prior_loss_weight" in caplog.text) == told
