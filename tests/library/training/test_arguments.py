from library.options import choose_from
from library.training.arguments import read_arguments, unknown_names


def test_values_are_python_literals():
    values, problems = read_arguments(["weight_decay=.1 ", "betas=.9,.99", "amsgrad=True", "note='a=b'"], flag="--x")
    assert values == {"weight_decay": 0.1, "betas": (0.9, 0.99), "amsgrad": True, "note": "a=b"}
    assert problems == []


def test_every_unreadable_value_is_reported_with_the_way_to_write_it():
    given = ["amsgrad=true", "eps=one", "ok=1", "weight_decay", "a=1 b=2"]
    values, problems = read_arguments(given, flag="--optimizer_args")
    assert values == {"ok": 1}
    assert [problem.what.split("=")[0] for problem in problems] == ["amsgrad", "eps", "weight_decay", "a"]
    assert problems[0].remedy == "Write True, with a capital."
    assert problems[3].remedy.startswith("Give each argument in quotes of its own")
    assert all(problem.where == "--optimizer_args" for problem in problems)


def test_a_value_that_is_code_is_not_run(tmp_path):
    target = tmp_path / "made"
    _, problems = read_arguments([f"x=open({str(target)!r}, 'w')"], flag="--x")
    assert len(problems) == 1
    assert not target.exists()


def test_an_unknown_name_is_answered_with_the_nearest_and_all():
    (problem,) = unknown_names(["weight_deacy", "eps"], ["betas", "eps", "weight_decay"], flag="--x", owner="AdamW")
    assert "'weight_deacy'" in problem.what
    assert problem.remedy == "Did you mean weight_decay? AdamW accepts: betas, eps, weight_decay."


def test_a_name_like_none_is_answered_with_all():
    assert choose_from("zzz", ["linear", "cosine"], "Available") == "Available: linear, cosine."
    assert choose_from("COSINE", ["linear", "cosine"], "Available").startswith("Did you mean cosine?")
