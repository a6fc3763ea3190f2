"""What a user sees of a mistake."""

import pytest

from library.errors import Problem, UserError, raise_if_any, run_script


def exit_code(main) -> int:
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    return stop.value.code


def test_a_users_mistake_is_one_block_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> int:
        raise UserError("bad value 'x'", where="--flag", remedy="Give 'y'.")

    assert exit_code(main) == 2
    assert capsys.readouterr().err == "\nerror: bad value 'x'\n  where:  --flag\n  remedy: Give 'y'.\n\n"


def test_all_problems_are_listed() -> None:
    error = UserError.of([Problem("one", "here", "mend"), Problem("two")])
    assert str(error) == "2 problems:\n1. one\n  where:  here\n  remedy: mend\n2. two"


def test_no_problem_raises_nothing() -> None:
    raise_if_any([])
    with pytest.raises(UserError, match="one"):
        raise_if_any([Problem("one")])


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (130, 130)])
def test_the_exit_code_is_what_main_returns(returned: int | None, code: int) -> None:
    assert exit_code(lambda argv: returned) == code


@pytest.mark.parametrize(("arguments", "code"), [((), 130), ((143,), 143)])
def test_an_interruption_ends_quietly(
    arguments: tuple[int, ...], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str]) -> int:
        raise KeyboardInterrupt(*arguments)

    assert exit_code(main) == code
    assert "Traceback" not in capsys.readouterr().err


def test_our_own_defects_keep_their_traceback() -> None:
    def main(argv: list[str]) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_script(main)


def test_names_steer_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> int:
        raise UserError(
            "cannot read 'a\nerror: all is well\x1b[2J'", where="/x/\x1b]0;title\x07.png", remedy="\u202egnp"
        )

    assert exit_code(main) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 5
    assert r"a\nerror: all is well\x1b[2J" in shown
    assert shown.replace("\n", "").isprintable()
