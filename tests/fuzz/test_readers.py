"""No file makes a reader fail, hang, run code or write outside its folder: 2,000 structured inputs for each.

``benchmarks/fuzz.py`` tries many more.
"""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.corpora import corpus
from tests.fuzz.readers import READERS, prepare
from tests.fuzz.strategies import BOMBS, STRATEGIES
from tests.fuzz.watch import Case, answer, warm_up


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fuzz") / "files"
    prepare(made)
    return made


@pytest.mark.parametrize("name", READERS)
def test_sound_files_are_read(name: str, folder: Path) -> None:
    """Else nothing behind the first check would ever be tried."""
    warm_up(READERS[name], corpus(name), folder)
    answers = [answer(READERS[name], case, folder) for case in corpus(name)]
    assert answers == [None] * len(answers)


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "regressions").iterdir()), ids=lambda path: path.name)
def test_files_that_once_found_something(path: Path, folder: Path) -> None:
    """Kept as ``benchmarks/fuzz.py`` writes them: reader, digest, and name of the file."""
    words, _, name = path.name.split("-", 2)
    reader = words.replace("_", " ")
    warm_up(READERS[reader], corpus(reader), folder)
    beside = Path(corpus(reader)[0].name).parent
    answer(READERS[reader], Case(str(beside / name), path.read_bytes()), folder)


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str, folder: Path) -> None:
    """Each of the worst that the strategies know."""
    warm_up(READERS[name], corpus(name), folder)
    for case in BOMBS[name]:
        answer(READERS[name], case, folder)


@pytest.mark.parametrize("name", READERS)
def test_structured_files(name: str, folder: Path) -> None:
    warm_up(READERS[name], corpus(name), folder)
    answers: list[str | None] = []

    @settings(
        max_examples=2000,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=STRATEGIES[name])
    def tried(case: Case) -> None:
        answers.append(answer(READERS[name], case, folder))

    tried()
    refused = sum(one is not None for one in answers)
    # Both must occur, or the strategy looks at one half of the reader only.
    assert 0 < refused < len(answers) or name == "info file"
