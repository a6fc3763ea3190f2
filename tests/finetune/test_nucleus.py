import torch

from finetune.nucleus import KeyedNucleus, nucleus_places
from library.randomness import torch_generator

PROBABILITIES = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)


def places(top_p, count=4000):
    draws = torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return nucleus_places(PROBABILITIES.expand(count, -1), draws, top_p=top_p).bincount(minlength=4) / count


def test_draws_have_the_probabilities_of_the_nucleus():
    torch.testing.assert_close(places(1.0), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.02, rtol=0)
    # 0.5 + 0.3 reach 0.8, so the third token is not needed any more.
    torch.testing.assert_close(places(0.8), torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(places(0.81), torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.02, rtol=0)


def test_one_token_at_least_is_in_the_nucleus():
    assert places(0.01).tolist() == [1, 0, 0, 0]


def test_the_largest_draw_stays_in_the_nucleus():
    draws = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert nucleus_places(PROBABILITIES, draws, top_p=0.8).item() == 1


def generators(names):
    return [torch_generator(42, "caption", name) for name in names]


def test_a_row_draws_the_same_alone_and_in_a_batch_and_leaves_global_generators_alone():
    scores = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    together = KeyedNucleus(generators("abc"), top_p=0.9)
    alone = [KeyedNucleus(generators(name), top_p=0.9) for name in "abc"]
    for _ in range(5):
        chosen = together(torch.zeros(3, 1), scores)
        assert (chosen > -torch.inf).sum(-1).tolist() == [1, 1, 1]
        rows = [processor(torch.zeros(1, 1), scores[row : row + 1])[0] for row, processor in enumerate(alone)]
        assert torch.equal(chosen, torch.stack(rows))
    assert torch.equal(torch.get_rng_state(), before)


def test_tokens_that_are_ruled_out_are_never_drawn():
    scores = torch.full((1, 10), -torch.inf)
    scores[0, 7] = 0.0
    for _ in range(20):
        chosen = KeyedNucleus(generators("a"), top_p=1.0)(torch.zeros(1, 1), scores)
        assert chosen.argmax().item() == 7
