"""A planar arm of two joints whose accelerations are to be foretold: the simplest problem of Jordan and Jacobs' kind.

N examples. Two links of length 1 and mass 1 at their ends, joints with a little friction, no gravity.
"""

import math

import torch
from torch import Tensor

FRICTION, SPEED, TORQUE = 0.2, 2.0, 3.0
"""Per joint; velocities and torques are uniform up to these."""
NUM_INPUTS, NUM_OUTPUTS = 6, 2


def swings(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """x [N, 6]: cosine and sine of the elbow's angle, two velocities, two torques; y [N, 2]: the two accelerations.

    float64. The accelerations solve M(q) a = τ − c(q, v) − friction · v, exactly, with the inertia M and the Coriolis
    forces c of the arm.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(most: float) -> tuple[Tensor, Tensor]:
        draw = (2.0 * torch.rand(2, count, generator=g, dtype=torch.float64) - 1.0) * most
        return draw[0], draw[1]

    elbow, _ = uniform(math.pi)
    (v1, v2), (t1, t2) = uniform(SPEED), uniform(TORQUE)
    cosine, sine = elbow.cos(), elbow.sin()
    m11, m12, m22 = 3.0 + 2.0 * cosine, 1.0 + cosine, torch.ones_like(cosine)
    b1 = t1 + sine * (2.0 * v1 * v2 + v2**2) - FRICTION * v1
    b2 = t2 - sine * v1**2 - FRICTION * v2
    determinant = m11 * m22 - m12**2
    a1, a2 = (m22 * b1 - m12 * b2) / determinant, (m11 * b2 - m12 * b1) / determinant
    return torch.stack((cosine, sine, v1, v2, t1, t2), 1), torch.stack((a1, a2), 1)
