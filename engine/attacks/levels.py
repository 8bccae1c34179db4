"""Public and private images of an attack, and how they are stored at each level of protection."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.records import Sample
from modeling.build import CIPHERS
from modeling.encryption.additive import NotSecureWarning
from modeling.encryption.cipher import Cipher, Sealed
from modeling.encryption.png_format import decode, encode
from modeling.encryption.sealed_image import MAGIC, SealedImage
from utils.errors import UserError
from utils.seeding import numpy_generator

MIN_IDENTITIES = 6
_VALIDATION_SHARE = 6  # one in this many public identities is held out
_VALIDATION_IMAGES = (64, 512)  # minimum and maximum number of held-out images
_DEFAULT_BUDGET = 4096  # public images
_IMAGES_EACH = 8  # of each held-out identity: some attacks need several


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N decoded images: 8-bit, on the CPU."""

    raw: Tensor  # uint8 (N, 3, H, W)
    desensitized: Tensor  # uint8 (N, 3, H, W)
    pids: Tensor  # int64 (N,)
    camids: Tensor  # int64 (N,)
    subjects: tuple[str, ...]  # subject labels under which the owner encrypts the images
    is_query: Tensor  # whether an image is a query, otherwise a gallery image, bool (N,)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.raw)

    @property
    def num_persons(self) -> int:
        """Number of identities."""
        return len(torch.unique(self.pids))


@dataclass(frozen=True)
class AttackSamples:
    """Samples of the public and private identities of an attack."""

    # training samples of the attacker, in random order: a smaller budget is a prefix
    public: tuple[Sample, ...]
    # samples of held-out public identities, on which the attacker chooses methods
    validation: tuple[Sample, ...]
    private: tuple[Sample, ...]  # query and gallery samples that attacks are scored on
    is_query: tuple[bool, ...]  # whether each private sample is a query


def choose_identities(
    train: Sequence[Sample],
    query: Sequence[Sample],
    gallery: Sequence[Sample],
    *,
    budget: int,
    people: int,
    seed: int,
) -> AttackSamples:
    """Choose public and private identities.

    Public identities are the training identities, with ``budget`` images; 0 means all, at most
    4,096. Private ones, at most ``people``, have query and gallery images; distractors are not
    used.

    Raises:
        UserError: There are too few identities or images.
    """
    rng = numpy_generator(seed, "attack people")
    known = [int(pid) for pid in rng.permutation(sorted({s.pid for s in train}))]
    held_out = set(known[: max(2, len(known) // _VALIDATION_SHARE)])
    _check_count("public", len(known), "training identities")
    order = rng.permutation(len(train))
    shuffled = [train[place] for place in order]
    public = [s for s in shuffled if s.pid not in held_out]
    images_of = {pid: [s for s in shuffled if s.pid == pid] for pid in known if pid in held_out}
    validation = [s for images in images_of.values() for s in images[:_IMAGES_EACH]]
    budget = budget or min(_DEFAULT_BUDGET, len(public))
    if budget > len(public):
        raise UserError(
            f"--budget is {budget}, but the public identities have {len(public)} images that are "
            f"not held out; expected at most {len(public)}"
        )
    least, most = _VALIDATION_IMAGES
    both = sorted({s.pid for s in query} & {s.pid for s in gallery})
    _check_count("private", len(both), "test identities with query and gallery images")
    chosen = {int(pid) for pid in rng.permutation(both)[:people]}
    sides = [(s, True) for s in query] + [(s, False) for s in gallery]
    kept = [(s, is_query) for s, is_query in sides if s.pid in chosen]
    return AttackSamples(
        public=tuple(public[:budget]),
        validation=tuple(validation[: min(max(budget // 2, least), most)]),
        private=tuple(s for s, _ in kept),
        is_query=tuple(is_query for _, is_query in kept),
    )


def _check_count(which: str, count: int, what: str) -> None:
    if count < MIN_IDENTITIES:
        raise UserError(
            f"the data set has {count} {which} identities ({what}); expected at least "
            f"{MIN_IDENTITIES}: an interval over fewer means little"
        )


CLEAR_LEVELS = ("raw", "desensitized", "anonymized")
ENCRYPTED_LEVELS = tuple(CIPHERS)
LEVELS = (*CLEAR_LEVELS, *ENCRYPTED_LEVELS)

# First identity number of the attacker; data sets have smaller ones, so no pad is shared.
_FIRST_ATTACKER_IDENTITY = 1_000_000_000


@dataclass(frozen=True, eq=False)
class Stored:
    """N images as they are stored at one level."""

    level: str  # name of the level
    plain: Tensor  # normalised images as the right key opens them, float32 (N, 3, H, W)
    observed: Tensor  # what an outsider sees, normalised, float32 (N, 3, H, W)
    # the cipher with the owner's keys; None at levels without encryption
    cipher: Cipher | None = None
    sealed: Sealed | None = None  # the ciphertexts; None at levels without encryption

    @property
    def encrypted(self) -> tuple[Cipher, Sealed]:
        """Cipher and ciphertexts of an encrypted level."""
        assert self.cipher is not None and self.sealed is not None
        return self.cipher, self.sealed


def seal(level: str, plain: Tensor, subjects: Sequence[str]) -> Stored:
    """Store plain images (N, 3, H, W) at a level, each under the key of its subject."""
    if level in CLEAR_LEVELS:
        return Stored(level, plain, plain)
    cipher = new_cipher(level)
    sealed = cipher.seal(plain, subjects)
    return Stored(level, cipher.quantize(plain), cipher.observe(sealed), cipher, sealed)


def new_cipher(level: str) -> Cipher:
    """Return a cipher with new keys."""
    with warnings.catch_warnings():  # its insecurity is what is measured here
        warnings.simplefilter("ignore", NotSecureWarning)
        return CIPHERS[level]()


def attacker_subjects(persons: Sequence[int]) -> tuple[str, ...]:
    """Return subject labels under which an attacker encrypts images."""
    return tuple(f"attacker/own/{_FIRST_ATTACKER_IDENTITY + int(person)}" for person in persons)


def fresh_key_observer(level: str) -> Callable[[Tensor], Tensor]:
    """Return a function from plain to observed images; it uses a new key for every image."""
    persons = itertools.count()

    def observe(plain: Tensor) -> Tensor:
        subjects = attacker_subjects(list(itertools.islice(persons, len(plain))))
        return seal(level, plain, subjects).observed

    return observe


_REACH = 2.0  # largest value of the additive scheme: image and pad are both in [-1, 1]


def stores_bytes(sealed: Sealed) -> bool:
    """Return whether a cipher stores bytes; otherwise it stores numbers, which files must round."""
    return sealed.payload.dtype == torch.uint8


def is_ised(sealed: Sealed) -> bool:
    """Return whether images are sealed in the ISED format (docs/ISED.md)."""
    return stores_bytes(sealed) and all(header.startswith(MAGIC) for header in sealed.headers)


def file_size(sealed: Sealed) -> int:
    """Return the file size of one image in bytes; without a file format, the number of values."""
    return len(encode(_as_image(sealed))) if is_ised(sealed) else sealed.payload.numel()


def through_file(sealed: Sealed) -> Sealed:
    """Write one sealed image to a file and read it again.

    Bytes of a cipher without a file format are returned unchanged. Numbers are rounded to 256 steps
    over their whole range, the best that 8 bits allow.

    Raises:
        FormatError: The image is in the ISED format, but cannot be a file.
    """
    if is_ised(sealed):
        image = decode(encode(_as_image(sealed)))
        pixels = np.frombuffer(image.pixels, np.uint8).reshape(tuple(sealed.payload.shape))
        return replace(sealed, payload=torch.from_numpy(pixels.copy()), headers=(image.chunk,))
    if stores_bytes(sealed):
        return sealed
    reach = max(_REACH, float(sealed.payload.abs().max()))
    scale = 255 / (2 * reach)
    steps = ((sealed.payload + reach) * scale).round().clamp(0, 255).to(torch.uint8)
    stream = io.BytesIO()
    Image.fromarray(steps[0].permute(1, 2, 0).numpy()).save(stream, format="PNG")
    read = torch.from_numpy(np.array(Image.open(stream)))
    return replace(sealed, payload=read.permute(2, 0, 1)[None].float() / scale - reach)


def _as_image(sealed: Sealed) -> SealedImage:
    height, width = sealed.payload.shape[1:3]
    return SealedImage(width, height, sealed.headers[0], sealed.payload[0].numpy().tobytes())
