import pytest

from library.models.variant import variant_of


@pytest.mark.parametrize(
    ("v2", "v_parameterization", "version", "width"),
    [
        (False, False, "sd_v1", 768),
        (False, True, "sd_v1_v", 768),
        (True, False, "sd_v2", 1024),
        (True, True, "sd_v2_v", 1024),
    ],
)
def test_the_flags_name_the_version_of_model_files(v2, v_parameterization, version, width):
    variant = variant_of(v2=v2, v_parameterization=v_parameterization)

    assert variant.base_model_version == version
    assert variant.text_width == width
    assert variant.latent_scale == 0.18215


def test_a_small_model_keeps_its_own_text_width():
    assert variant_of(v2=False, v_parameterization=False, text_width=64).text_width == 64
