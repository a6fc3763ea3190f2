import pytest

from library.errors import UserError
from tools.cache_text_encoder_outputs import main


def test_it_says_what_to_do_instead(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as caught:
        main(["--dataset_config", "data.toml", "--cache_text_encoder_outputs_to_disk"])
    assert "--cache_text_encoder_outputs" in (caught.value.problems[0].remedy or "")
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "tools/cache_latents.py" in capsys.readouterr().out
