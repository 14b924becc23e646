"""The object in the place of TRL 1.13's logits: what TRL asks of it, against full logits; all else raises."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("trl", reason="trl is not installed (the extra `trl`)")

from trl.trainer import utils

import rlhf_kernels as rk
from rlhf_kernels.integrations.trl_1_13_logits import LogitsNeverMade, entropy_from_logits, selective_log_softmax

TEMPERATURE = 0.7


@pytest.fixture
def both():
    """(full logits [4, 6, 11] before temperature, the same never made, targets [4, 6] with some that do not count)"""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((4, 6, 5), (11, 5)))
    targets = torch.randint(11, (4, 6), generator=generator)
    targets[:, :2], targets[:, -1] = -100, -100
    outputs = ("entropy", "is_top1", "mean_logit", "log_sum_sq_probs")
    results = rk.linear_logprobs(hidden, weight, targets, temperature=TEMPERATURE, outputs=outputs)
    never = LogitsNeverMade({"targets": targets} | results._asdict(), TEMPERATURE)
    return hidden @ weight.T, never, targets


def test_what_dpo_asks(both):
    logits, never, targets = both
    full, never = (logits / TEMPERATURE)[..., :-1, :], (never / TEMPERATURE)[..., :-1, :]
    targets = targets[:, :-1]
    counts = targets != -100
    ids = targets.clamp(min=0)  # TRL asks for every token and drops those that do not count

    def same(ours, theirs):
        torch.testing.assert_close(ours[counts], theirs[counts])

    same(selective_log_softmax(never, ids), utils.selective_log_softmax(full, ids))
    same(entropy_from_logits(never.detach()), utils.entropy_from_logits(full))
    same(torch.logsumexp(never, dim=-1), torch.logsumexp(full, dim=-1))
    same(torch.logsumexp(2.0 * never, dim=-1), torch.logsumexp(2.0 * full, dim=-1))
    same(never.argmax(dim=-1) == targets, full.argmax(dim=-1) == targets)
    ours, theirs, half, hers = never.chunk(2, dim=0)[0], full.chunk(2)[0], counts.chunk(2)[0], ids.chunk(2)[0]
    assert ours.size(0) == 2
    torch.testing.assert_close(ours[half].mean(-1), theirs[half].mean(-1))
    torch.testing.assert_close(F.cross_entropy(ours[half], hers[half]), F.cross_entropy(theirs[half], hers[half]))


def test_what_grpo_asks(both):
    logits, never, targets = both
    full, never = logits[:, :-1, :][:, -3:, :] / TEMPERATURE, never[:, :-1, :][:, -3:, :] / TEMPERATURE
    ids = targets[:, :-1][:, -3:]
    torch.testing.assert_close(selective_log_softmax(never, ids), utils.selective_log_softmax(full, ids))
    torch.testing.assert_close(entropy_from_logits(never), utils.entropy_from_logits(full))


def test_logits_that_were_made_take_trls_way(both):
    logits, _, targets = both
    ids = targets.clamp(min=0)
    torch.testing.assert_close(selective_log_softmax(logits, ids), utils.selective_log_softmax(logits, ids))
    torch.testing.assert_close(entropy_from_logits(logits), utils.entropy_from_logits(logits))


def test_another_temperature_or_other_targets_are_refused(both):
    """They were scored at one temperature, for one target each: another answer would be wrong."""
    _, never, targets = both
    ids = targets.clamp(min=0)
    for other in (never, never / 0.5, 2.0 * (never / TEMPERATURE)):
        with pytest.raises(TypeError, match="asked of logits that were never made"):
            selective_log_softmax(other, ids)
        with pytest.raises(TypeError, match="asked of logits that were never made"):
            entropy_from_logits(other)
    with pytest.raises(TypeError, match="log-probs of other tokens than those that were scored"):
        selective_log_softmax(never / TEMPERATURE, (ids + 1) % 11)
    with pytest.raises(TypeError, match="log-probs of other tokens"):
        selective_log_softmax(never / TEMPERATURE, ids[:, :-1])


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: torch.softmax(x, -1),
        lambda x: F.cross_entropy(x[x._tokens["targets"] >= 0], torch.zeros(12, dtype=torch.long), reduction="sum"),
        lambda x: x[:, :, :5],
        lambda x: x[0],
        lambda x: x.chunk(2, dim=-1),
        lambda x: x.mean(0),
        lambda x: x.argmax(dim=1),
        lambda x: x.size(-1),
        lambda x: torch.logsumexp(3.0 * x, dim=-1),
    ],
)
def test_other_questions_are_refused(ask, both):
    with pytest.raises(TypeError, match=r"asked of logits that were never made\. .* takes TRL's trainer as it is"):
        ask(both[1] / TEMPERATURE)


def test_methods_that_are_not_there_say_why(both):
    with pytest.raises(AttributeError, match="float: asked of logits that were never made"):
        both[1].float()


def test_what_was_not_scored_is_refused(both):
    _, never, _ = both
    bare = LogitsNeverMade({k: v for k, v in never._tokens.items() if k in ("targets", "logprobs", "logsumexp")})
    for ask in (entropy_from_logits, lambda x: x.mean(-1), lambda x: x.argmax(-1)):
        with pytest.raises(TypeError, match="asked of logits that were never made"):
            ask(bare)


def test_trl_may_write_into_log_probs(both):
    """It sets those of prompts to zero, in place."""
    _, never, targets = both
    never = never / TEMPERATURE
    own = never._tokens["logprobs"].clone()
    logprobs = selective_log_softmax(never, targets.clamp(min=0))
    logprobs[:] = 7.0
    torch.testing.assert_close(never._tokens["logprobs"], own)


def test_entropy_has_a_gradient_where_one_is_recorded():
    entropy = torch.ones(2, 3, requires_grad=True) * 2
    never = LogitsNeverMade({"targets": torch.zeros(2, 3, dtype=torch.long), "entropy": entropy})
    assert entropy_from_logits(never).requires_grad
    with torch.no_grad():
        assert not entropy_from_logits(never).requires_grad
    assert not entropy_from_logits(never.detach()).requires_grad
