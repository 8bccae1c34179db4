"""Every attack on data whose right answer is known: broken schemes fall, sound ones do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from hashlib import sha256
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.attacks import brute_force, key_reuse, levels, tampering
from engine.attacks.brute_force import GUESSES, guessable_keys, search_aead
from engine.attacks.key_reuse import (
    block_mid_range,
    filter_bank,
    gaussian,
    groups_of,
    image_counts,
    known_pairs,
    median,
    same_identity,
    within_pad,
)
from engine.attacks.levels import (
    ImageSet,
    Stored,
    attacker_subjects,
    fresh_key_observer,
    seal,
    stores_bytes,
    through_file,
)
from engine.attacks.measures import FAILS, HOLDS, Result
from engine.attacks.suite import ATTACKS
from layers.pixels import PixelSpace
from modeling.build import CIPHERS
from modeling.encryption.aead import AeadCipher, MemoryKeys
from modeling.encryption.cipher import Sealed, dequantize_pixels, quantize_pixels
from modeling.encryption.ised_errors import FormatError, MissingKey
from modeling.encryption.primitives import SubjectKey
from modeling.encryption.sealed_image import LOCATOR_BYTES
from tests.fixtures.attack_scene import make_scene

CIPHERTEXT_ATTACKS = [
    "linkage", "brute-force", "known-plaintext", "averaging", "difference", "denoise", "wrong-key",
    "malleability", "storage", "metadata",
]  # fmt: skip


class StreamCipher(AeadCipher):
    """A broken scheme: bytes and a stream that is the person's for ever, without any tag."""

    def __init__(self, modular: bool) -> None:
        super().__init__()
        self._modular = modular

    def _stream(self, shape: tuple[int, ...], header: bytes) -> Tensor:
        generator = torch.Generator().manual_seed(int.from_bytes(header, "big"))
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def seal(self, images: Tensor, subjects: Sequence[str]) -> Sealed:
        headers = tuple(int(s.rsplit("/", 1)[1]).to_bytes(4, "big") for s in subjects)
        pixels = quantize_pixels(images)
        streams = torch.stack([self._stream(pixels.shape[1:], header) for header in headers])
        mixed = pixels + streams if self._modular else pixels ^ streams
        return Sealed(mixed, headers, images.device)

    def open(self, sealed: Sealed, keys: Any) -> Tensor:
        streams = torch.stack([self._stream(sealed.payload.shape[1:], h) for h in sealed.headers])
        mixed = sealed.payload
        pixels = mixed - streams if self._modular else mixed ^ streams
        return dequantize_pixels(pixels)


class CarelessKeys(MemoryKeys):
    """Keys that were chosen instead of drawn at random."""

    def sealing_key(self, subject: str) -> SubjectKey:
        number = int(subject.rsplit("/", 1)[1])
        key = list(guessable_keys(4 * (number + 1)))[4 * number + 2]
        return SubjectKey(bytes(LOCATOR_BYTES), key, bytes(32))

    def opening_key(self, header: bytes) -> bytes:
        raise MissingKey("not needed")


def attack(name: str, level: str, **settings: Any) -> Result:
    return ATTACKS[name].run(make_scene(**settings), level).result


# Only for tests that change nothing: they share the results.
result_of = cache(attack)


def test_every_cipher_is_a_level() -> None:
    assert tuple(CIPHERS) == levels.ENCRYPTED_LEVELS
    assert not set(levels.CLEAR_LEVELS) & set(CIPHERS)


@pytest.mark.parametrize("name", CIPHERTEXT_ATTACKS)
def test_additive_falls(name: str) -> None:
    assert result_of(name, "additive").verdict == FAILS


@pytest.mark.parametrize("level", [name for name, cipher in CIPHERS.items() if cipher.secure])
@pytest.mark.parametrize("name", CIPHERTEXT_ATTACKS)
def test_what_calls_itself_secure_stands(name: str, level: str) -> None:
    if name == "brute-force" and level not in GUESSES:
        pytest.skip("no way to guess the keys of this cipher is registered")
    assert result_of(name, level).verdict == HOLDS


def test_additive_falls_as_completely_as_published() -> None:
    assert result_of("linkage", "additive").measure("rank1").value.value == 1
    assert result_of("brute-force", "additive").measure("opened").value.value == 1
    assert result_of("known-plaintext", "additive").measure("psnr").value.value > 140
    assert result_of("difference", "additive").measure("correlation").value.value > 0.9999
    assert result_of("malleability", "additive").measure("accepted").value.value == 1
    assert result_of("wrong-key", "additive").measure("opened").value.value == 1
    assert 0.4 < result_of("storage", "additive").measure("exact").value.value < 0.6
    assert result_of("metadata", "additive").measure("named").value.value == 1


def test_aead_refuses_every_change_and_keeps_every_value() -> None:
    result = result_of("malleability", "aead")
    assert result.details["untouched_accepted"] == 1  # so rejecting everything is not a pass
    assert set(result.details["accepted_by_kind"].values()) == {0.0}
    assert len(result.details["accepted_by_kind"]) == 10
    assert result_of("storage", "aead").measure("exact").value.value == 1
    assert result_of("wrong-key", "aead").measure("opened").value.value == 0


@pytest.mark.parametrize(("modular", "algebra"), [(False, "exclusive or"), (True, "modular")])
def test_a_stream_used_twice_falls_whatever_its_algebra(
    modular: bool, algebra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What protects aead is not that its ciphertexts are bytes."""
    monkeypatch.setattr(levels, "new_cipher", lambda level: StreamCipher(modular))
    known = attack("known-plaintext", "aead")
    assert known.details["algebra"].startswith(algebra)
    assert known.measure("psnr").value.value > 190  # bytes come back exactly
    assert known.verdict == FAILS
    difference = attack("difference", "aead")
    assert difference.verdict == FAILS
    assert difference.measure("correlation").value.value > 0.99
    assert difference.details["algebra"].startswith(algebra)


@pytest.mark.parametrize(
    "name", ["linkage", "known-plaintext", "difference", "wrong-key", "malleability", "metadata"]
)
def test_any_broken_scheme_falls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose headers and files are not those of docs/ISED.md."""
    monkeypatch.setitem(CIPHERS, "stream", partial(StreamCipher, modular=False))
    assert ATTACKS[name].reason_against("stream") == ""
    assert attack(name, "stream").verdict == FAILS


def test_numbers_beyond_the_additive_range_are_kept_as_well_as_eight_bits_can() -> None:
    payload = torch.linspace(-5, 5, 3 * 8 * 4).view(1, 3, 8, 4)
    one = Sealed(payload, (b"x",), torch.device("cpu"))
    assert not stores_bytes(one)
    assert (through_file(one).payload - payload).abs().max() <= 5 / 255 + 1e-6


def test_splices_come_from_another_header() -> None:
    headers = [b"a", b"b", b"b", b"a"]
    assert tampering._partner(headers, [1, 1, 1, 1], 1) == 0
    assert tampering._partner(headers, [1, 2, 2, 1], 1) == 0  # no other image of that identity
    assert tampering._partner(headers, [1, 2, 2, 2], 1) == 3  # the same person's comes first
    assert tampering._partner([b""] * 3, [1, 1, 1], 2) == 0


def test_a_key_that_can_be_guessed_is_found() -> None:
    scene = make_scene()
    plain = scene.plain("private", "anonymized")[:6]
    subjects = [f"set/test/{number}" for number in (3, 5, 7, 11, 13, 999)]
    cipher = AeadCipher(CarelessKeys())
    sealed = cipher.seal(plain, subjects)
    stored = Stored("aead", cipher.quantize(plain), cipher.observe(sealed), cipher, sealed)
    search = search_aead(stored, torch.arange(6), 100)
    assert sorted(search.opened) == [0, 1, 2, 3, 4]  # the last key is beyond what was tried
    assert torch.allclose(search.opened[2], stored.plain[2])


@pytest.mark.parametrize("at_once", [1, 7, 1 << 16])
def test_a_number_beyond_the_search_is_not_found(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(brute_force, "_PADS_AT_ONCE", at_once)
    result = attack("brute-force", "additive", keys=105)  # private persons are 100..111
    assert result.measure("opened").value.value == pytest.approx(5 / 12)
    assert result.budget == 105


def test_wrong_guesses_are_never_taken_for_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The range test alone would open with a pad that fits by luck: it is checked on all values."""
    monkeypatch.setattr(brute_force, "_PREFIX", 1)
    result = attack("brute-force", "additive")
    assert result.measure("opened").value.value == 1


def test_averaging_gets_better_with_more_images() -> None:
    result = attack("averaging", "additive")
    found = [point.measures[0].value.value for point in result.curve]
    assert [point.x for point in result.curve] == list(range(1, 11))
    assert found[-1] > found[0]
    assert found[-1] > result.measure("psnr").floor.value + 6


def test_groups_and_pairs_are_of_one_person() -> None:
    pids = torch.tensor([4, 9, 4, 9, 4, 7, 4])
    target, known = known_pairs(pids)
    assert sorted(target.tolist()) == [2, 3, 4, 6]
    assert (pids[target] == pids[known]).all()
    assert not set(target.tolist()) & set(known.tolist())
    first, second = same_identity(pids)
    assert (pids[first] == pids[second]).all()
    assert (first != second).all()
    targets, groups = groups_of(pids, 2)
    assert (pids[groups] == pids[targets][:, None]).all()
    assert (groups[:, 0] == targets).all()
    assert 7 not in pids[targets]
    assert image_counts(torch.arange(8).repeat_interleave(3)) == range(1, 4)


def test_mid_range_sees_through_uniform_noise() -> None:
    """Far better than the mean of the same 64 values: .006 against .07."""
    generator = torch.Generator().manual_seed(1)
    blocks = torch.rand(1, 3, 4, 2, generator=generator) - 0.5
    plain = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)
    noisy = plain + 2 * torch.rand(plain.shape, generator=generator) - 1
    error = (block_mid_range(noisy, 8) - plain).abs().mean()
    assert error < (gaussian(noisy, 4.0) - plain).abs().mean() / 3
    assert error < 0.05


def test_filters_keep_constants_and_shapes() -> None:
    images = torch.full((2, 3, 30, 18), 0.25)
    for name, run in filter_bank().items():
        assert torch.allclose(run(images), images, atol=1e-5), name
    spike = torch.zeros(1, 3, 9, 9)
    spike[..., 4, 4] = 1
    assert median(spike, 3).max() == 0
    assert torch.allclose(gaussian(spike, 1.0)[..., 2:7, 2:7].sum(), torch.tensor(3.0), atol=0.2)


def test_estimates_stay_within_what_the_pad_allows() -> None:
    observed = torch.tensor([-1.8, 0.0, 1.8]).view(1, 3, 1, 1)
    kept = within_pad(torch.zeros_like(observed), observed)
    assert torch.allclose(kept.flatten(), torch.tensor([-0.8, 0.0, 0.8]))


def test_an_attacker_never_has_a_private_key() -> None:
    scene = make_scene()
    assert not set(attacker_subjects(range(200))) & set(scene.private.subjects)
    plain = scene.plain("private", "anonymized")[:4]
    own = seal("additive", plain, attacker_subjects(scene.private.pids[:4].tolist()))
    assert not torch.allclose(own.observed, scene.stored("additive").observed[:4], atol=0.1)


def test_every_observation_is_under_a_new_key() -> None:
    plain = make_scene().plain("public", "anonymized")[:2]
    for level in ("additive", "aead"):
        observe = fresh_key_observer(level)
        assert not torch.allclose(observe(plain), observe(plain), atol=0.1)
    assert torch.equal(fresh_key_observer("anonymized")(plain), plain)


def test_tampering_changes_something_each_time() -> None:
    scene = make_scene()
    for level in ("additive", "aead"):
        sealed = scene.stored(level).sealed
        assert sealed is not None
        for name, change in tampering.tampered(sealed.at(0), sealed.at(1)):
            try:
                changed = change()
            except FormatError:  # another kind is not a valid file
                assert name == "bit of the kind flipped"
                continue
            same_header = changed.headers == sealed.at(0).headers
            assert not (
                same_header
                and changed.payload.shape == sealed.at(0).payload.shape
                and torch.equal(changed.payload, sealed.at(0).payload)
            ), (level, name)


def test_a_square_has_no_sides_to_swap() -> None:
    scene = make_scene()
    sealed = scene.stored("aead").sealed
    assert sealed is not None
    square = replace(sealed.at(0), payload=sealed.at(0).payload[:, :16])
    names = [name for name, _ in tampering.tampered(square, square)]
    assert "sides swapped" not in names


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_every_attack_says_where_it_does_not_apply(name: str) -> None:
    entry = ATTACKS[name]
    assert entry.name == name
    assert entry.question.endswith("?")
    for level in levels.ENCRYPTED_LEVELS:
        unsearched = name == "brute-force" and level not in GUESSES
        assert bool(entry.reason_against(level)) is unsearched
    if name in CIPHERTEXT_ATTACKS and name != "linkage":
        assert all("nothing is encrypted" in entry.reason_against(x) for x in levels.CLEAR_LEVELS)


def test_keys_that_need_no_secret_are_numbers_and_their_digests() -> None:
    assert list(guessable_keys(52))[-4:] == [
        bytes(31) + b"\x0c",
        b"0" * 30 + b"12",
        sha256(b"12").digest(),
        sha256(b"0012").digest(),
    ]


def test_levels_before_encryption_are_the_images_they_are_named_after() -> None:
    space = PixelSpace((0.485, 0.456, 0.406), (0.5, 0.4, 0.6))
    raw, desensitized = torch.randint(0, 256, (2, 5, 3, 4, 2), dtype=torch.uint8)
    ones = torch.ones(5, dtype=torch.int64)
    images = ImageSet(raw, desensitized, ones, ones, ("x/test/1",) * 5, ones.bool())
    halves = nn.Module()
    halves.forward = lambda batch: batch / 2
    scene = make_scene()
    bench = replace(scene.bench, pixels=space, batch_size=2)
    scene = replace(scene, private=images, anonymizer=halves, bench=bench)
    assert torch.equal(scene.plain("private", "raw"), space.normalize(raw))
    assert torch.equal(scene.plain("private", "desensitized"), space.normalize(desensitized))
    assert torch.equal(scene.plain("private", "anonymized"), space.normalize(raw) / 2)


def test_modular_differences_are_those_of_signed_bytes() -> None:
    pairs = torch.cartesian_prod(torch.arange(256), torch.arange(0, 256, 15))
    first, second = (pairs / 127.5 - 1).T.reshape(2, 1, 3, 256, 6)
    found = key_reuse.DIFFERENCES["modular difference"](first, second)
    expected = [(a - b + 128) % 256 - 128 for a, b in pairs.tolist()]
    assert found.flatten().tolist() == expected
