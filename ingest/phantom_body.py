"""The patient on the phantom's film: where lungs and heart are, and the densities of tissue, air, vessels and bones.

The plan: soft tissue everywhere, air where the lungs are, less air where the heart is; bones and vessels are drawn as
lines on top. What is wrong with the patient is added by phantom_findings, from the same geometry.
"""

import math

import numpy as np

from ingest.phantom_canvas import TEXTURE, Array, Draw, Field, Frame, Lines, Point, along, bump, sign, step
from ingest.phantom_case import Case


class Body:
    """One patient on one film: shared geometry, then a method per kind of tissue."""

    def __init__(self, case: Case) -> None:
        self.case, self.p, self.e, self.f = case, case.patient, case.exposure, case.findings
        self.field, self.frame = Field(case.seed, case.index), Frame(case.exposure)
        self.hand = Draw(case.seed, TEXTURE, case.index, 99)
        self.x, self.y = self.frame.grids()
        self.base = self.p.apex + (self.p.base - self.p.apex) * self.e.breath
        self.height = self.base - self.p.apex
        self.down = np.clip((self.y - self.p.apex) / self.height, 0, 1.3)
        self.lateral = self._lateral(np.clip(self.down, 0, 1))
        self.lungs = {side: self._lung(side) for side in ("right", "left")}
        self.heart = self._heart()

    # Geometry

    def lateral_at(self, t: float) -> float:
        """Distance of the lung's lateral border from the midline, `t` of the way from apex to base."""
        return float(self._lateral(min(max(t, 0.0), 1.0)))

    def _lateral(self, t: Array | float) -> Array:
        rest = 1 - t
        top = np.sqrt(1 - rest * rest * rest)
        return self.p.chest * (top * (1 - 0.35 * self.p.taper) + 0.35 * self.p.taper * t)

    def _lung(self, side: str) -> Array:
        """Mask of one lung inside the rib cage, the mediastinum's strip left out."""
        across = self.x * sign(side)
        off = (across - 0.42 * self.p.chest) / (0.58 * self.p.chest)
        floor = self.base + sign(side) * 0.5 * self.p.right_higher + self.p.dome * off * off
        inner = np.float32(self.p.mediastinum * 0.75) + sign(side) * np.float32(self.e.turn)
        return (
            step((self.lateral - across) * 45)
            * step((across - inner) * 40)
            * step((floor - self.y) * 40)
            * step((self.y - self.p.apex) * 50)
        )

    def _heart(self) -> Array:
        """Mask of heart and great vessels, 0-1."""
        p, x = self.p, self.x - self.e.turn
        width = (
            p.chest
            * p.heart
            * (1.06 if self.e.view == "AP" else 1.0)
            * (1 + self.f.heart)
            * (1.06 - 0.1 * self.e.breath)
        )
        floor = self.base - 0.02
        tall = p.chest * p.heart * (1 + 0.65 * self.f.heart) * (0.95 + 0.15 * p.tilt)
        left = self._oval(x - 0.42 * width, self.y - (floor - 0.62 * tall), 0.92 * width, tall, 0.5 + 0.5 * p.tilt)
        right = self._oval(x + 0.10 * width, self.y - (floor - 0.75 * tall), 0.66 * width, 0.95 * tall, 0.0)
        knob = self._oval(
            x - p.mediastinum * 0.75, self.y - (p.apex + 0.36 * self.height), p.knob * 1.1, p.knob * 1.2, 0.0
        )
        strip = step((p.mediastinum * (1 + 0.5 * step((self.y + 0.25) * 4)) - np.abs(x)) * 28)
        return np.maximum.reduce([left, right, knob, strip * step((floor + 0.3 - self.y) * 20)])

    @staticmethod
    def _oval(x: Array, y: Array, rx: float, ry: float, lean: float) -> Array:
        u = (x - lean * 0.5 * y) / rx
        v = (y + lean * 0.25 * x) / ry
        return step((1 - np.sqrt(u * u + v * v)) * (18 * rx))

    def room(self) -> Array:
        """Where air can be replaced."""
        return (self.lungs["right"] + self.lungs["left"]) * (1 - 0.8 * self.heart)

    def expanded(self) -> Array:
        """Mask: 0 where the pneumothorax has displaced the lung, 1 elsewhere."""
        assert self.f.pneumothorax is not None
        depth, side = self.f.pneumothorax.depth, self.f.pneumothorax.side
        t = np.clip(self.down - 0.22 * depth, 0, 1)
        rest = 1 - t
        edge = self.lateral * (1 - depth * (1 - 0.75 * t)) * np.sqrt(1 - rest * rest * rest * rest)
        return 1 - step((self.x * sign(side) - edge) * 48) * (self.lungs[side] > 0.05)

    # Tissue

    def tissue(self) -> Array:
        """Chest wall, mediastinum, abdomen and air."""
        p, ax = self.p, np.abs(self.x)
        wide = np.float32(p.chest + 0.10 + 0.13 * p.soft)
        half = 0.26 + (wide - 0.26) * step((self.y + 0.84) * 6) + 0.12 * np.clip(self.y, 0, 1)
        wall = np.sqrt(np.clip(1 - (ax / half) * (ax / half), 0, 1))
        density = 0.42 * p.soft * np.sqrt(wall) + 0.52 * step((half - ax) * 9)
        density += 0.10 * self.field.smooth(1, 5) * wall + 0.03 * self.field.smooth(2, 24)
        density -= self._air()
        density += 0.10 * self.heart + self._abdomen() + self._arms(ax, half)
        return density + self._breasts()

    def _air(self) -> Array:
        """What the lungs take away, with trachea; vessels are left standing in it."""
        open_lung = 1 - 0.86 * self.heart
        lungs = self.lungs["right"] + self.lungs["left"]
        depth = 0.44 + 0.10 * bump(((self.down - 0.55) * 1.1) ** 2)
        air = lungs * open_lung * depth
        trachea = bump(((self.x - self.e.turn * 0.6) * 19) ** 2) * step((self.p.apex + 0.42 - self.y) * 8)
        return air + 0.13 * trachea - lungs * open_lung * self._vessels()

    def _vessels(self) -> Array:
        """Branching vessels from both hila; more and thicker with edema, none outside a collapsed lung."""
        lines = Lines(self.frame)
        for side in ("right", "left"):
            s, hilum = sign(side), (0.5 * self.p.mediastinum + 0.12, self.p.apex + 0.5 * self.height)
            for _ in range(9 + int(6 * self.f.edema)):
                self._branch(lines, s, hilum, self.hand.between(-1.3, 1.45), self.hand.between(0.18, 0.42))
        hila = sum(
            bump(
                ((self.x - sign(s) * (0.06 + self.p.mediastinum)) * 9) ** 2
                + ((self.y - (self.p.apex + 0.5 * self.height)) * 6.5) ** 2
            )
            for s in ("right", "left")
        )
        layer = lines.layer(0.7 + 0.5 * self.f.edema) * (0.22 + 0.12 * self.f.edema) + 0.16 * hila
        return layer * self.expanded() if self.f.pneumothorax else layer

    def _branch(self, lines: Lines, s: int, start: Point, angle: float, length: float) -> None:
        bend = self.hand.between(-0.6, 0.6)
        x, y, width = start[0], start[1], 0.026
        for part in range(3):
            x2, y2 = x + math.cos(angle) * length / 2.5, y + math.sin(angle) * length / 2
            lines.line([(s * x, y), (s * x2, y2)], width, 0.85 - 0.2 * part)
            x, y, angle, width = x2, y2, angle + bend * 0.5, width * 0.62

    def _abdomen(self) -> Array:
        """Liver and spleen are thick; a gas bubble lies under the left dome."""
        below = step((self.y - (self.base + 0.06)) * 6)
        gas = ((self.x - 0.26) * 5) ** 2 + ((self.y - (self.base + 0.16)) * 8) ** 2
        return 0.12 * below - 0.16 * bump(gas) * below

    def _arms(self, ax: Array, half: Array) -> Array:
        if not self.p.arms:
            return np.zeros_like(ax)
        arm = (ax - half - 0.16) * 7
        return 0.5 * np.sqrt(np.clip(1 - arm * arm, 0, 1)) * step((self.y + 0.45) * 8)

    def _breasts(self) -> Array:
        if not self.p.breast:
            return np.zeros_like(self.x)
        u = (np.abs(self.x) - 0.62 * self.p.chest) * 3.2
        v = (self.y - (self.base - 0.08)) * 3.4
        return self.p.breast * step((1 - np.sqrt(u * u + v * v)) * 5) * (1 - 0.5 * np.clip(-v, 0, 1))

    # Bones

    def bones(self) -> Array:
        """Ribs, clavicles, shoulder blades and spine."""
        ribs, spine = Lines(self.frame), Lines(self.frame)
        for side in (-1, 1):
            for number in range(10):
                self._rib(ribs, side, self.p.apex - 0.08 + number * self.p.rib_pitch * self.e.breath)
            self._shoulder(ribs, side)
        for number in range(13):
            self._vertebra(spine, self.p.apex - 0.22 + number * 0.125)
        layer = 0.13 * ribs.layer(0.8) * (1 - 0.75 * step((self.y - (self.base + 0.04)) * 7)) + 0.22 * spine.layer(2.2)
        return self.p.bone * layer

    def _rib(self, lines: Lines, side: int, top: float) -> None:
        """A posterior rib with brighter edges, and the fainter anterior one that crosses it."""
        edge = 1.05 * max(self.lateral_at((top + 0.12 - self.p.apex) / self.height), 0.2)
        fall = self.p.rib_slope

        def back(t: float) -> Point:
            return side * (0.05 + (edge - 0.05) * t), top - 0.10 * math.sin(math.pi * min(t * 0.9, 1)) + fall * t * t

        def front(t: float) -> Point:
            return side * (edge - (edge - 0.2) * t), top + fall + 0.02 + 0.17 * math.sin(math.pi / 2 * t)

        lines.line(along(front), 0.05, 0.22)
        lines.line(along(back), 0.052, 0.85)
        lines.line(along(back), 0.03, 0.55)

    def _shoulder(self, lines: Lines, side: int) -> None:
        p = self.p
        lines.line(
            along(lambda t: (side * (0.06 + 0.72 * t), p.apex + 0.14 - 0.20 * t + 0.05 * math.sin(6.3 * t))), 0.06, 0.8
        )
        lines.polygon(
            [
                (side * (p.chest + 0.02), p.apex + 0.08),
                (side * (p.chest + 0.22), p.apex + 0.1),
                (side * (p.chest + 0.05), p.apex + 0.62),
            ],
            0.35,
        )
        lines.line(along(lambda t: (side * (p.chest + 0.26), p.apex + 0.02 + 0.12 * t), 4), 0.16, 0.8)

    def _vertebra(self, lines: Lines, y: float) -> None:
        x = self.p.curve * math.sin(3.2 * (y + 0.8))
        lines.polygon([(x - 0.075, y), (x + 0.075, y), (x + 0.08, y + 0.10), (x - 0.08, y + 0.10)], 0.6)
        for side in (-1, 1):
            lines.line([(x + side * 0.055, y + 0.03), (x + side * 0.055, y + 0.06)], 0.03, 1.0)
