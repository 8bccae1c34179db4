"""The joints of a walking person in metres, and their projection into a camera."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

# Body axes: x to the person's left, y up, z forward. Lengths of a person of 1.70 m.
_HIP_Y, _THIGH, _SHIN, _ANKLE = 0.90, 0.43, 0.40, 0.07
_TRUNK, _UPPER_ARM, _FOREARM = 0.50, 0.29, 0.25


@dataclass(frozen=True)
class View:
    """Direction from which the camera sees a person.

    Attributes:
        yaw: Radians; 0: the person faces the camera, pi/2: walks to the right of the image.
        pitch: Downward angle of the camera, radians.
    """

    yaw: float
    pitch: float

    def project(self, point: Vector) -> Vector:
        """Return (right, up, towards the camera) of a point in body axes, metres."""
        x, y, z = point
        right = x * math.cos(self.yaw) + z * math.sin(self.yaw)
        near = -x * math.sin(self.yaw) + z * math.cos(self.yaw)
        up = y * math.cos(self.pitch) - near * math.sin(self.pitch)
        return np.array([right, up, near * math.cos(self.pitch) + y * math.sin(self.pitch)])


def _swing(angle: float, length: float, outward: float = 0.0) -> Vector:
    """Return a limb that hangs down, rotated forward and outward (radians)."""
    return length * np.array([math.sin(outward), -math.cos(angle), math.sin(angle)])


def walking_joints(
    phase: float, *, stride: float, lean: float, shoulder: float, carrying: int = 0
) -> dict[str, Vector]:
    """Return the joints of a walking person of 1.70 m.

    Args:
        phase: Phase of the gait cycle, radians.
        stride: Amplitude of the thighs, radians.
        lean: Forward lean of the trunk, radians.
        shoulder: Half the distance of the shoulders, metres.
        carrying: +1 or -1 if the left or right arm holds a bag and does not swing, else 0.

    Returns:
        Points in body axes by name; names of joints on one side end in ``_l`` or ``_r``.
    """
    joints: dict[str, Vector] = {"pelvis": np.array([0.0, _HIP_Y, 0.0])}
    joints["neck"] = joints["pelvis"] + _TRUNK * np.array([0, math.cos(lean), math.sin(lean)])
    joints["head"] = joints["neck"] + np.array([0, 0.17, 0.02 + 0.1 * lean])
    for name, sign, shift in (("l", 1, 0.0), ("r", -1, math.pi)):
        swing = math.sin(phase + shift)
        thigh = stride * swing + 0.06
        # The knee bends while the leg swings forward, and slightly under load.
        bend = 0.10 + 1.5 * stride * max(0.0, math.cos(phase + shift)) + 0.25 * max(0.0, -swing)
        hip = joints["pelvis"] + np.array([sign * 0.088, 0, 0])
        knee = hip + _swing(thigh, _THIGH)
        ankle = knee + _swing(thigh - bend, _SHIN, 0.02 * sign)
        pitch = -0.9 * max(0.0, -swing) * stride + 0.35 * max(0.0, swing) * stride
        joints[f"hip_{name}"], joints[f"knee_{name}"], joints[f"ankle_{name}"] = hip, knee, ankle
        toe = np.array([0.03 * sign, -0.045 + 0.16 * math.sin(pitch), 0.17 * math.cos(pitch)])
        joints[f"heel_{name}"] = ankle + np.array([0, -0.035, -0.035])
        joints[f"toe_{name}"] = ankle + toe
        still = 0.15 if carrying == sign else 1.0
        arm = -0.85 * stride * swing * still
        elbow_bend = (0.25 + 0.35 * max(0.0, -swing)) * still
        root = joints["neck"] + np.array([sign * shoulder, -0.08, 0])
        elbow = root + _swing(arm, _UPPER_ARM, 0.16 * sign)
        joints[f"shoulder_{name}"], joints[f"elbow_{name}"] = root, elbow
        joints[f"hand_{name}"] = elbow + _swing(arm + elbow_bend, _FOREARM, 0.06 * sign)
    floor = min(joints["ankle_l"][1], joints["ankle_r"][1]) - _ANKLE
    return {name: point - np.array([0, floor, 0]) for name, point in joints.items()}
