"""All ciphers invert; additive equals the published pad; aead refuses wrong keys and changes."""

from __future__ import annotations

import warnings

import pytest
import torch

from modeling.build import CIPHERS
from modeling.encryption.additive import AdditiveCipher, NotSecureWarning
from modeling.encryption.aead import AeadCipher, MemoryKeys
from modeling.encryption.cipher import (
    Cipher,
    Sealed,
    dequantize_pixels,
    quantize_pixels,
    read_sealed,
)
from modeling.encryption.ised_errors import MissingKey, Tampered, WrongKey
from modeling.encryption.primitives import EvaluationKeys, KeyOf

SUBJECTS = ["set/test/7", "set/test/12", "set/test/7"]

pytestmark = pytest.mark.filterwarnings("ignore::modeling.encryption.additive.NotSecureWarning")


def _images(count: int = 3, height: int = 20, width: int = 10) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return 2 * torch.rand(count, 3, height, width, generator=generator) - 1


@pytest.fixture(params=sorted(CIPHERS))
def cipher(request: pytest.FixtureRequest) -> Cipher:
    return CIPHERS[request.param]()


def test_every_cipher_opens_to_the_quantized_images(cipher: Cipher) -> None:
    images = _images()
    opened = cipher.open(cipher.seal(images, SUBJECTS), cipher.keys.opening_key)
    expected = cipher.quantize(images)
    assert opened.dtype == expected.dtype == torch.float32
    assert opened.shape == images.shape
    if cipher.secure:  # it encrypts bytes
        assert torch.equal(opened, expected)
    else:
        torch.testing.assert_close(opened, expected, rtol=0, atol=1e-6)


def test_every_cipher_hides_the_image_from_an_observer(cipher: Cipher) -> None:
    images = _images()
    reading = read_sealed(cipher, cipher.seal(images, SUBJECTS), "ciphertext")
    assert reading.images.shape == images.shape
    assert reading.images.dtype == torch.float32
    assert (reading.images - images).abs().mean() > 0.3
    assert reading.num_refused == 0


def test_every_cipher_accepts_an_empty_batch(cipher: Cipher) -> None:
    sealed = cipher.seal(_images()[:0], [])
    assert cipher.open(sealed, cipher.keys.opening_key).shape == (0, 3, 20, 10)
    assert read_sealed(cipher, sealed, "wrong").images.shape == (0, 3, 20, 10)


def test_every_cipher_refuses_a_malformed_batch(cipher: Cipher) -> None:
    with pytest.raises(ValueError, match="expected \\(B, 3, H, W\\)"):
        cipher.seal(_images()[0], SUBJECTS)
    with pytest.raises(ValueError, match="2 subjects for 3 images"):
        cipher.seal(_images(), SUBJECTS[:2])
    broken = _images()
    broken[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        cipher.seal(broken, SUBJECTS)


def test_wrong_key_is_refused_by_aead_and_garbage_from_additive() -> None:
    images = _images()
    aead = AeadCipher()
    sealed = aead.seal(images, SUBJECTS)
    reading = read_sealed(aead, sealed, "wrong")
    assert reading.num_refused == 3
    assert torch.equal(reading.images, aead.observe(sealed))

    additive = AdditiveCipher()
    reading = read_sealed(additive, additive.seal(images, SUBJECTS), "wrong")
    assert reading.num_refused == 0
    assert (reading.images - images).abs().mean() > 0.3


def test_each_image_is_refused_separately() -> None:
    class Half(AeadCipher):
        """Opens the first image with any key."""

        def open(self, sealed: Sealed, key_of: KeyOf) -> torch.Tensor:
            if len(sealed) > 1 or sealed.headers[0] in refused:
                raise WrongKey("refused")
            return super().open(sealed, self.keys.opening_key)

    images, cipher = _images(), Half()
    sealed = cipher.seal(images, SUBJECTS)
    refused = sealed.headers[1:]
    before = sealed.payload.clone()
    reading = read_sealed(cipher, sealed, "wrong")
    assert reading.num_refused == 2
    assert torch.equal(reading.images[:1], cipher.quantize(images)[:1])
    assert torch.equal(reading.images[1:], cipher.observe(sealed)[1:])
    assert torch.equal(sealed.payload, before)


def test_wrong_key_is_refused_when_there_is_only_one_subject() -> None:
    aead = AeadCipher()
    assert read_sealed(aead, aead.seal(_images(1), ["a/b/1"]), "wrong").num_refused == 1


def test_unknown_key_state_is_an_error(cipher: Cipher) -> None:
    with pytest.raises(ValueError, match="right, wrong, ciphertext"):
        read_sealed(cipher, cipher.seal(_images(), SUBJECTS), "left")  # type: ignore[arg-type]


def test_additive_is_the_published_pad_and_leaves_the_global_generator_alone() -> None:
    images = torch.zeros(2, 3, 8, 4)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    sealed = AdditiveCipher().seal(images, ["x/test/1501", "x/test/-1"])
    assert torch.equal(torch.get_rng_state(), before)
    for index, pid in enumerate((1501, -1)):
        torch.manual_seed(pid)
        assert torch.equal(sealed.payload[index], 2 * torch.rand(3, 8, 4) - 1)


def test_additive_stays_in_float32_under_autocast() -> None:
    images = _images()
    cipher = AdditiveCipher()
    expected = cipher.seal(images, SUBJECTS).payload
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sealed = cipher.seal(images, SUBJECTS)
        assert torch.equal(sealed.payload, expected)
        assert cipher.open(sealed, cipher.keys.opening_key).dtype == torch.float32


def test_additive_warns_once_that_it_is_not_secure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdditiveCipher, "_warned", False)
    with pytest.warns(NotSecureWarning, match="not secure"):
        AdditiveCipher()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdditiveCipher()


def test_additive_caches_a_limited_number_of_pads() -> None:
    cipher = AdditiveCipher()
    for pid in range(200):
        cipher.seal(torch.zeros(1, 3, 2, 2), [f"s/test/{pid}"])
    assert cipher._pad.cache_info().currsize == 128


def test_additive_requires_an_identity_number() -> None:
    with pytest.raises(ValueError, match="does not end in an identity number"):
        AdditiveCipher().seal(_images(1), ["s/test/anna"])


def test_aead_never_repeats_a_stream() -> None:
    cipher = AeadCipher()
    sealed = cipher.seal(torch.zeros(2, 3, 16, 8), ["s/test/1", "s/test/1"])
    assert sealed.headers[0][8:88] != sealed.headers[1][8:88]  # salt, locator and commitment
    assert not torch.equal(sealed.payload[0], sealed.payload[1])


def test_aead_detects_changed_pixels_and_foreign_keys() -> None:
    cipher = AeadCipher()
    sealed = cipher.seal(_images(1), ["s/test/1"])
    with pytest.raises(MissingKey):
        cipher.open(sealed, MemoryKeys().opening_key)
    sealed.payload[0, 3, 4, 1] ^= 1
    with pytest.raises(Tampered):
        cipher.open(sealed, cipher.keys.opening_key)
    damaged = bytearray(sealed.headers[0])
    damaged[60] ^= 4
    with pytest.raises(WrongKey):
        cipher.open(
            type(sealed)(sealed.payload, (bytes(damaged),), sealed.device),
            cipher.keys.opening_key,
        )


def _every_byte() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3)


def test_pixels_round_half_to_even_and_round_trip() -> None:
    halves = torch.tensor([0.5, 1.5, 2.5, 254.5]) / 127.5 - 1
    row = halves.view(1, 1, 1, 4).expand(1, 3, 1, 4)
    exact = (halves + 1) * 127.5
    assert quantize_pixels(row)[0, 0, :, 0].tolist() == exact.round().tolist()
    images = dequantize_pixels(_every_byte())
    assert torch.equal(images[0, 0].flatten(), (torch.arange(256).double() / 127.5 - 1).float())
    assert torch.equal(quantize_pixels(images), _every_byte())
    ends = torch.tensor([-1.1, 1.1]).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    assert quantize_pixels(ends)[0, 0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_pixels_keep_their_position() -> None:
    images = _images(2)
    pixels = quantize_pixels(images)
    assert pixels.shape == (2, 20, 10, 3)
    expected = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(pixels, expected)
    assert (dequantize_pixels(pixels) - images).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.gpu
def test_pixels_of_a_gpu_equal_those_of_a_cpu() -> None:
    images = 1.2 * _images(4)
    pixels = quantize_pixels(images)
    assert torch.equal(quantize_pixels(images.cuda()).cpu(), pixels)
    assert torch.equal(dequantize_pixels(pixels.cuda()).cpu(), dequantize_pixels(pixels))
    assert torch.equal(
        dequantize_pixels(_every_byte().cuda()).cpu(), dequantize_pixels(_every_byte())
    )


def test_keys_hide_their_secret() -> None:
    for cipher_class in CIPHERS.values():
        keys = cipher_class().keys
        assert isinstance(keys, EvaluationKeys)
        assert repr(keys.sealing_key("s/test/1")) == "SubjectKey(...)"
