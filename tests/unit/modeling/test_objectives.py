"""Loss terms, the networks that get their gradients, and their weighted sum."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from layers.blocks import Recomputable
from modeling.build import build_networks, build_objectives
from modeling.objectives import (
    GENERATOR_TERMS,
    PAIR_TERMS,
    REID_TERMS,
    Objectives,
    discriminator_losses,
    generator_losses,
    reid_losses,
    weighted,
)
from modeling.privacy_networks import PrivacyNetworks, ReIDOnly, frozen
from modeling.reid_network import PrivacyOutput, ReIDOutput, ReIDPair
from tests.fixtures import tiny
from utils.config_tree import changed
from utils.errors import UserError

if TYPE_CHECKING:
    from yacs.config import CfgNode

    MakeCfg = Callable[..., CfgNode]

BATCH, CLASSES = 4, 3
LABEL = torch.tensor([0, 0, 2, 2])


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.install(monkeypatch)


def build(make_cfg: MakeCfg, *overrides: str) -> tuple[Any, Objectives]:
    torch.manual_seed(0)
    cfg = make_cfg("MODEL.PRETRAIN_CHOICE", "none", "MODEL.VAL_R1", "inf", *overrides)
    nets = build_networks(cfg, CLASSES)
    return nets, build_objectives(cfg, CLASSES, nets.reid.feature_size)


def images() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    raw, target = torch.rand(2, BATCH, 3, 64, 32) * 2 - 1
    return raw, target


def has_gradients(module: nn.Module) -> list[bool]:
    return [parameter.grad is not None for parameter in module.parameters()]


def test_terms_and_their_weights(make_cfg: MakeCfg) -> None:
    nets, objectives = build(make_cfg)
    raw, target = images()
    out = nets(raw)
    judged = discriminator_losses(nets, raw, target, out, objectives)
    losses = generator_losses(nets, raw, target, out, objectives)
    losses |= reid_losses(out, LABEL, objectives)

    assert set(losses) == set(objectives.weights)
    assert all(loss.ndim == 0 and loss.dtype == torch.float32 for loss in losses.values())
    published = {
        "anonymization": 100.0,
        "recovery": 100.0,
        "gan_anonymized": 1.0,
        "gan_recovered": 1.0,
        "reid_raw_cross_entropy": 1.0,
        "reid_raw_triplet": 1.0,
        "reid_raw_center": 5e-4,
        "reid_protected_cross_entropy": 1.0,
        "reid_protected_triplet": 1.0,
        "reid_protected_center": 5e-4,
    }
    assert {name: objectives.weights[name] for name in published} == published
    expected = sum(objectives.weights[name] * loss.item() for name, loss in losses.items())
    assert weighted(losses, objectives.weights).item() == pytest.approx(expected, rel=1e-5)
    # a discriminator's loss is the sum of its terms, not their mean
    expected = sum(loss.item() for loss in judged.values())
    assert weighted(judged).item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(losses["anonymization"], (out.anonymized - target).abs().mean())
    torch.testing.assert_close(losses["recovery"], (out.recovered - raw).abs().mean())


@pytest.mark.parametrize(
    "name",
    [
        *GENERATOR_TERMS,
        *(f"reid_{kind}_{term}" for kind in ("raw", "protected") for term in REID_TERMS),
    ],
)
def test_every_term_is_finite_and_teaches_a_network(make_cfg: MakeCfg, name: str) -> None:
    nets, objectives = build(make_cfg)
    raw, target = images()
    out = nets(raw)
    losses = generator_losses(nets, raw, target, out, objectives)
    loss = (losses | reid_losses(out, LABEL, objectives))[name]
    assert loss.ndim == 0
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    loss.backward()
    learning = (nets.anonymizer, nets.recovery, nets.reid)
    gradients = [p.grad for network in learning for p in network.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any((gradient != 0).any() for gradient in gradients)


def test_discriminators_see_the_pairs_of_the_method(make_cfg: MakeCfg) -> None:
    nets, objectives = build(make_cfg)
    raw, target = images()
    nets.eval()  # so that one judgement does not depend on the others
    out = nets(raw)
    first, second = nets.discriminators
    bce = functional.binary_cross_entropy_with_logits

    def expect(value: Tensor, logits: Tensor, is_real: float) -> None:
        torch.testing.assert_close(value, bce(logits, torch.full_like(logits, is_real)))

    judged = discriminator_losses(nets, raw, target, out, objectives)
    expect(judged["discriminator_anonymized_fake"], first(raw, out.anonymized), 0)
    expect(judged["discriminator_anonymized_real"], first(raw, target), 1)
    expect(judged["discriminator_recovered_fake"], second(out.anonymized, out.recovered), 0)
    expect(judged["discriminator_recovered_real"], second(out.anonymized, raw), 1)
    losses = generator_losses(nets, raw, target, out, objectives)
    expect(losses["gan_anonymized"], first(raw, out.anonymized), 1)
    expect(losses["gan_recovered"], second(out.anonymized, out.recovered), 1)


def test_a_discriminator_step_gives_generators_no_gradients(make_cfg: MakeCfg) -> None:
    nets, objectives = build(make_cfg)
    raw, target = images()
    out = nets(raw)
    weighted(discriminator_losses(nets, raw, target, out, objectives)).backward()
    for judge in nets.discriminators:
        assert all(has_gradients(judge))
    for network in (nets.anonymizer, nets.recovery, nets.reid):
        assert not any(has_gradients(network))


def test_a_generator_step_gives_discriminators_no_gradients(make_cfg: MakeCfg) -> None:
    nets, objectives = build(make_cfg)
    raw, target = images()
    out = nets(raw)
    with frozen(*nets.discriminators):
        losses = generator_losses(nets, raw, target, out, objectives)
        losses |= reid_losses(out, LABEL, objectives)
    weighted(losses, objectives.weights).backward()  # after the context, as in the loop
    for judge in nets.discriminators:
        assert not any(has_gradients(judge))
        assert all(parameter.requires_grad for parameter in judge.parameters())
    for network in (nets.anonymizer, nets.recovery):
        assert all(has_gradients(network))
    assert objectives.centers is not None
    assert all(has_gradients(objectives.centers))


@pytest.mark.parametrize(
    "term", ["recovery", "gan_recovered", "gan_anonymized", "reid_protected_triplet"]
)
def test_recovery_identity_and_adversarial_terms_reach_the_anonymizer(
    make_cfg: MakeCfg, term: str
) -> None:
    nets, objectives = build(make_cfg)
    raw, target = images()
    out = nets(raw)
    with frozen(*nets.discriminators):
        losses = generator_losses(nets, raw, target, out, objectives)
        losses |= reid_losses(out, LABEL, objectives)
    losses[term].backward()
    gradients = [parameter.grad for parameter in nets.anonymizer.parameters()]
    assert sum(gradient.abs().sum().item() for gradient in gradients if gradient is not None) > 0


def test_frozen_restores_after_an_error_and_leaves_frozen_parameters_frozen() -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    with pytest.raises(RuntimeError), frozen(module):
        assert not module.weight.requires_grad
        raise RuntimeError
    assert module.weight.requires_grad
    assert not module.bias.requires_grad


@pytest.mark.parametrize("mode", ["GCR", "C"])
@pytest.mark.parametrize(
    ("output_mode", "kinds"),
    [
        ("both", {"raw", "protected"}),
        ("joined", {"raw", "protected"}),
        ("origin", {"raw"}),
        ("protected", {"protected"}),
    ],
)
def test_the_output_mode_chooses_the_images_of_the_identity_loss(
    make_cfg: MakeCfg, mode: str, output_mode: str, kinds: set[str]
) -> None:
    nets, objectives = build(make_cfg, "MODEL.MODE", mode, "MODEL.OUTPUT_MODE", output_mode)
    raw, desensitized = images()
    losses = reid_losses(nets(raw, desensitized), LABEL, objectives)
    assert set(losses) == {f"reid_{kind}_{term}" for kind in kinds for term in REID_TERMS}
    if "protected" in kinds:  # only the baseline's protected images are the desensitized ones
        name = "reid_protected_cross_entropy"
        other = reid_losses(nets(raw, desensitized.flip(3) * 0.5), LABEL, objectives)
        assert torch.equal(other[name], losses[name]) is (mode == "GCR")


@pytest.mark.parametrize("mode", ["GCR", "C"])
def test_joined_images_share_the_statistics_of_batch_norm(make_cfg: MakeCfg, mode: str) -> None:
    raw, desensitized = images()
    nets, _ = build(make_cfg, "MODEL.MODE", mode, "MODEL.OUTPUT_MODE", "joined")
    alone = copy.deepcopy(nets.reid)
    nets.train()
    output = nets(raw, desensitized)
    assert output.reid_raw is not None
    assert output.reid_protected is not None
    protected = output.anonymized.detach() if isinstance(output, PrivacyOutput) else desensitized
    expected = alone.train()(torch.cat((raw, protected)))
    halves = zip(vars(output.reid_raw).values(), vars(output.reid_protected).values(), strict=True)
    for parts, whole in zip(halves, vars(expected).values(), strict=True):
        torch.testing.assert_close(torch.cat(parts), whole)
    for name, buffer in nets.reid.named_buffers():
        torch.testing.assert_close(buffer, alone.get_buffer(name))


def test_modes(make_cfg: MakeCfg) -> None:
    joint, _ = build(make_cfg)
    assert isinstance(joint, PrivacyNetworks)
    assert set(joint.official_networks) == {"G", "G_R", "C", "D1", "D2"}
    assert joint(images()[0]).recovered.shape == (BATCH, 3, 64, 32)

    alone, _ = build(make_cfg, "MODEL.MODE", "C")
    assert isinstance(alone, ReIDOnly)
    assert set(alone.official_networks) == {"C"}
    assert alone.discriminators == ()


@pytest.mark.parametrize("mode", ["GCR", "C"])
def test_grad_checkpoint_chooses_whether_activations_are_recomputed(
    make_cfg: MakeCfg, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.undo()  # the tiny backbone recomputes nothing
    for words, chosen in (((), False), (("SOLVER.GRAD_CHECKPOINT", "True"), True)):
        nets, _ = build(make_cfg, "MODEL.MODE", mode, *words)
        parts = [module for module in nets.modules() if isinstance(module, Recomputable)]
        assert len(parts) == (3 if mode == "GCR" else 1)
        assert all(part.recompute is chosen for part in parts)


def test_options_reach_the_losses(make_cfg: MakeCfg) -> None:
    nets, objectives = build(
        make_cfg,
        "MODEL.CENTER_LOSS", "off",
        "MODEL.WEIGHT_REGULARIZED_TRIPLET", "off",
        "MODEL.GAN_MODE", "lsgan",
        "SOLVER.MARGIN", "1.5",
    )  # fmt: skip
    raw, target = images()
    out = nets(raw)
    assert objectives.centers is None
    assert not any("center" in name for name in reid_losses(out, LABEL, objectives))
    torch.testing.assert_close(objectives.triplet(torch.zeros(4, 2), LABEL), torch.tensor(1.5))
    nets.eval()
    judged = discriminator_losses(nets, raw, target, out, objectives)
    logits = nets.discriminator_anonymized(raw, target)
    torch.testing.assert_close(
        judged["discriminator_anonymized_real"], (logits - 1).square().mean()
    )
    weighted(judged).backward()


def test_normalised_triplet_and_smoothing_follow_the_configuration(make_cfg: MakeCfg) -> None:
    torch.manual_seed(2)
    features = torch.randn(BATCH, 8)
    plain = build(make_cfg)[1].triplet
    scaled = build(make_cfg, "LOSS.TRIPLET_NORMALIZED", "True")[1].triplet
    torch.testing.assert_close(scaled(7 * features, LABEL), scaled(features, LABEL))
    assert not torch.allclose(plain(7 * features, LABEL), plain(features, LABEL))

    logits = torch.randn(BATCH, CLASSES)
    outputs = ReIDPair(ReIDOutput(logits=logits, feature=features, embedding=features), None)
    for words, share in (((), 0.1), (("LOSS.LABEL_SMOOTHING", "0.3"), 0.3)):
        _, objectives = build(make_cfg, "MODEL.CENTER_LOSS", "off", *words)
        target = (1 - share) * functional.one_hot(LABEL, CLASSES) + share / CLASSES
        expected = -(target * logits.log_softmax(1)).sum(1).mean()
        losses = reid_losses(outputs, LABEL, objectives)
        torch.testing.assert_close(losses["reid_raw_cross_entropy"], expected)


PAIRS = ("LOSS.ALIGNMENT", "2", "LOSS.CONSISTENCY", "3", "LOSS.CROSS_TRIPLET", "0.5")


def _output(seed: int) -> ReIDOutput:
    generator = torch.Generator().manual_seed(seed)
    logits, feature, embedding = (
        torch.randn(BATCH, size, generator=generator, requires_grad=True)
        for size in (CLASSES, 8, 8)
    )
    return ReIDOutput(logits=logits, feature=feature, embedding=embedding)


def test_pair_terms_are_their_definitions(make_cfg: MakeCfg) -> None:
    _, objectives = build(make_cfg, "MODEL.CENTER_LOSS", "off", *PAIRS)
    raw, protected = _output(1), _output(2)
    losses = reid_losses(ReIDPair(raw, protected), LABEL, objectives)

    distance, divergence = 0.0, 0.0
    for row in range(BATCH):
        one, other = raw.embedding[row], protected.embedding[row]
        distance += (1 - one @ other / (one.norm() * other.norm())).item() / BATCH
        p, q = raw.logits[row].softmax(0), protected.logits[row].softmax(0)
        divergence += (p * (p / q).log()).sum().item() / BATCH
    assert losses["reid_alignment"].item() == pytest.approx(distance, rel=1e-5)
    assert losses["reid_consistency"].item() == pytest.approx(divergence, rel=1e-5)
    both = objectives.triplet(torch.cat([raw.feature, protected.feature]), LABEL.repeat(2))
    torch.testing.assert_close(losses["reid_cross_triplet"], both)
    weights = {name: objectives.weights[name] for name in PAIR_TERMS}
    assert weights == {"reid_alignment": 2, "reid_consistency": 3, "reid_cross_triplet": 0.5}


def test_alignment_and_consistency_leave_raw_images_alone(make_cfg: MakeCfg) -> None:
    _, objectives = build(make_cfg, "MODEL.CENTER_LOSS", "off", *PAIRS)
    raw, protected = _output(1), _output(2)
    losses = reid_losses(ReIDPair(raw, protected), LABEL, objectives)
    (losses["reid_alignment"] + losses["reid_consistency"]).backward()
    assert raw.embedding.grad is None and raw.logits.grad is None
    assert protected.embedding.grad is not None and protected.logits.grad is not None

    same = reid_losses(ReIDPair(raw, raw), LABEL, objectives)
    assert same["reid_alignment"].item() == pytest.approx(0, abs=1e-6)
    assert same["reid_consistency"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("mode", ["GCR", "C"])
def test_pair_terms_train_both_modes(make_cfg: MakeCfg, mode: str) -> None:
    nets, objectives = build(make_cfg, "MODEL.MODE", mode, *PAIRS)
    losses = reid_losses(nets(*images()), LABEL, objectives)
    sum(losses[name] for name in PAIR_TERMS).backward()  # type: ignore[union-attr]
    first = next(nets.parameters())
    assert first.grad is not None and (first.grad != 0).any()
    # Attackers train on one kind of image: there is no pair.
    alone = reid_losses(ReIDPair(nets.reid(images()[0]), None), LABEL, objectives)
    assert not set(alone) & set(PAIR_TERMS)


def test_losses_are_float32_under_autocast(make_cfg: MakeCfg) -> None:
    nets, objectives = build(make_cfg, *PAIRS)
    raw, target = images()
    with torch.autocast("cpu", torch.bfloat16):
        out = nets(raw)
        losses = discriminator_losses(nets, raw, target, out, objectives)
        losses |= generator_losses(nets, raw, target, out, objectives)
        losses |= reid_losses(out, LABEL, objectives)
        total = weighted(losses)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    total.backward()
    for parameter in nets.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_a_loss_without_a_weight_is_an_error() -> None:
    with pytest.raises(KeyError, match="unknown_term"):
        weighted({"unknown_term": torch.zeros(())}, {})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("UNET.NUM_DOWNS", 7, r"divisible by 128 \(INPUT\.IMG_SIZE, UNET\.NUM_DOWNS\)"),
        ("UNET.NUM_DOWNS", 10**9, r"UNET\.NUM_DOWNS is 1000000000; expected .* from 5 to 10"),
        ("UNET.NUM_DOWNS", "7", r"UNET\.NUM_DOWNS is '7'; expected a whole number"),
        ("INPUT.IMG_SIZE", (10**9, 64), r"INPUT\.IMG_SIZE is 1000000000; .* to 4096"),
        ("INPUT.IMG_SIZE", (64,), r"INPUT\.IMG_SIZE is \(64,\); expected height and width"),
        ("MODEL.NGF", 10**9, r"MODEL\.NGF is 1000000000; expected .* to 1024"),
        ("MODEL.NDF", 10**9, r"MODEL\.NDF is 1000000000; expected .* to 1024"),
    ],
)
def test_a_wrong_size_is_an_error_before_anything_is_allocated(
    make_cfg: MakeCfg, name: str, value: object, message: str
) -> None:
    """Checkpoints record these sizes, so they can be hostile."""
    cfg = changed(make_cfg("MODEL.PRETRAIN_CHOICE", "none"), {name: value})
    with pytest.raises(UserError, match=message):
        build_networks(cfg, CLASSES)
