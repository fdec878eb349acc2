"""Draw a case as a chest film: densities along the beam, then the tone curve, blur and noise of a detector.

The plan: soft tissue everywhere, air where the lungs are, less air where the heart, fluid or consolidation is; bones,
vessels, tubes drawn as lines on top. Only sums, products and square roots of float32 are used on pixels (no exp, no pow), so that a
film is the same on every CPU, whatever vector units NumPy finds there.

Arrays are (320, 320) float32 unless said otherwise; lengths are half film widths in the patient's frame (phantom_case).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from ingest.phantom_case import TEXTURE, Case, Device, Draw, Exposure
from shards.counter import hash64

SIZE = 320
_FINE = 2  # lines are drawn at twice the resolution and averaged

Array = NDArray[np.float32]
Point = tuple[float, float]
Points = list[Point]


def draw_film(case: Case) -> Array:
    """The film of a case: float32 (320, 320), whole numbers 0..255."""
    body = _Body(case)
    density = body.tissue() + body.bones() + body.lung_findings() + body.devices()
    return _develop(density, case)


def _sign(side: str) -> int:
    """+1 where the patient's left is, on the right of the image."""
    return 1 if side == "left" else -1


def _step(z: Array) -> Array:
    """Smooth step from 0 at z = -1 to 1 at z = 1."""
    t = np.clip(z * np.float32(0.5) + np.float32(0.5), 0, 1)
    return t * t * (3 - 2 * t)


def _bump(r2: Array) -> Array:
    """Bell over the squared radius: 1 at 0, 0 from 1 on."""
    t = np.clip(1 - r2, 0, None)
    return t * t


class _Field:
    """Smooth noise, made from counters, so that each use has its own and no order matters."""

    def __init__(self, case: Case) -> None:
        self._key = (case.seed, TEXTURE, case.index)

    def smooth(self, purpose: int, cells: int) -> Array:
        """Noise in about [-1, 1] that varies over 1/`cells` of the film."""
        grid = _signed(hash64(*self._key, purpose, np.arange(cells * cells))).reshape(cells, cells)
        return np.asarray(Image.fromarray(grid).resize((SIZE, SIZE), Image.Resampling.BICUBIC))

    def grain(self, purpose: int) -> Array:
        """Independent pixels, near Gaussian (a sum of four uniforms), standard deviation 1."""
        words = hash64(*self._key, purpose, np.arange(SIZE * SIZE)).view(np.uint16).reshape(SIZE, SIZE, 4)
        total = words[..., 0].astype(np.float32) + words[..., 1] + words[..., 2] + words[..., 3]
        return (total - np.float32(131070.0)) * np.float32(1 / 37837.2)


def _signed(hashes: NDArray[np.uint64]) -> Array:
    return (hashes >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)


@dataclass(frozen=True, slots=True)
class _Frame:
    """The map between the patient's frame and the film."""

    exposure: Exposure

    def grids(self) -> tuple[Array, Array]:
        """The patient's x and y at each pixel."""
        axis = ((np.arange(SIZE, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / SIZE)) - np.float32(1)
        e, cos, sin = self.exposure, math.cos(self.exposure.roll), math.sin(self.exposure.roll)
        x, y = (axis[None, :] - e.shift[0]) / e.zoom, (axis[:, None] - e.shift[1]) / e.zoom
        return (cos * x + sin * y).astype(np.float32), (cos * y - sin * x).astype(np.float32)

    def pixels(self, points: Iterable[Point]) -> Points:
        """Patient points as (column, row) on the fine canvas."""
        e, cos, sin = self.exposure, math.cos(self.exposure.roll), math.sin(self.exposure.roll)
        half = SIZE * _FINE / 2
        return [
            (
                (e.zoom * (cos * x - sin * y) + e.shift[0] + 1) * half,
                (e.zoom * (sin * x + cos * y) + e.shift[1] + 1) * half,
            )
            for x, y in points
        ]


class _Lines:
    """A layer of drawn lines, density 0-1."""

    def __init__(self, frame: _Frame) -> None:
        self._frame = frame
        self._image = Image.new("L", (SIZE * _FINE, SIZE * _FINE))
        self._draw = ImageDraw.Draw(self._image)

    def line(self, points: Iterable[Point], width: float, value: float) -> None:
        """A polyline; `width` in half film widths, `value` 0-1 overwrites what is below."""
        pixels = max(1, round(width * self._frame.exposure.zoom * SIZE * _FINE / 2))
        self._draw.line(self._frame.pixels(points), fill=int(255 * value), width=pixels)

    def polygon(self, points: Iterable[Point], value: float) -> None:
        self._draw.polygon(self._frame.pixels(points), fill=int(255 * value))

    def layer(self, blur: float = 0.0) -> Array:
        """The layer as an array, blurred by `blur` film pixels."""
        small = np.asarray(self._image.reduce(_FINE), dtype=np.float32) * np.float32(1 / 255)
        return gaussian_filter(small, blur, truncate=2.5) if blur else small


def _along(curve: Callable[[float], Point], steps: int = 14) -> Points:
    return [curve(i / (steps - 1)) for i in range(steps)]


class _Body:
    """One patient on one film: shared geometry, then a method per kind of tissue."""

    def __init__(self, case: Case) -> None:
        self.case, self.p, self.e, self.f = case, case.patient, case.exposure, case.findings
        self.field, self.frame = _Field(case), _Frame(case.exposure)
        self.hand = Draw(case.seed, TEXTURE, case.index, 99)
        self.x, self.y = self.frame.grids()
        self.base = self.p.apex + (self.p.base - self.p.apex) * self.e.breath
        self.height = self.base - self.p.apex
        self.down = np.clip((self.y - self.p.apex) / self.height, 0, 1.3)
        self.lateral = self._lateral_array()
        self.lungs = {side: self._lung(side) for side in ("right", "left")}
        self.heart = self._heart()

    # Geometry

    def lateral_at(self, t: float) -> float:
        """Distance of the lung's lateral border from the midline, `t` of the way from apex to base."""
        t = min(max(t, 0.0), 1.0)
        top = math.sqrt(1 - (1 - t) ** 3)
        return self.p.chest * (top * (1 - 0.35 * self.p.taper) + 0.35 * self.p.taper * t)

    def _lateral_array(self) -> Array:
        t = np.clip(self.down, 0, 1)
        rest = 1 - t
        top = np.sqrt(1 - rest * rest * rest)
        return self.p.chest * (top * np.float32(1 - 0.35 * self.p.taper) + np.float32(0.35 * self.p.taper) * t)

    def _dome_top(self, side: str) -> float:
        return self.base - self.p.right_higher * (0.5 if side == "right" else -0.5)

    def _lung(self, side: str) -> Array:
        """Mask of one lung inside the rib cage, the mediastinum's strip left out."""
        across = self.x * _sign(side)
        off = (across - np.float32(0.42 * self.p.chest)) / np.float32(0.58 * self.p.chest)
        floor = self._dome_top(side) + np.float32(self.p.dome) * off * off
        inner = np.float32(self.p.mediastinum * 0.75) + _sign(side) * np.float32(self.e.turn)
        return (
            _step((self.lateral - across) * 45)
            * _step((across - inner) * 40)
            * _step((floor - self.y) * 40)
            * _step((self.y - np.float32(self.p.apex)) * 50)
        )

    def _heart(self) -> Array:
        """Mask of heart and great vessels, 0-1."""
        p, x = self.p, self.x - np.float32(self.e.turn)
        width = (
            p.chest
            * p.heart
            * (1.10 if self.e.view == "AP" else 1.0)
            * (1 + self.f.heart)
            * (1.06 - 0.1 * self.e.breath)
        )
        floor = self.base - 0.02
        tall = p.chest * p.heart * (1 + 0.45 * self.f.heart) * (0.95 + 0.15 * p.tilt)
        left = self._oval(x - 0.42 * width, self.y - (floor - 0.62 * tall), 0.92 * width, tall, 0.5 + 0.5 * p.tilt)
        right = self._oval(x + 0.10 * width, self.y - (floor - 0.75 * tall), 0.66 * width, 0.95 * tall, 0.0)
        knob = self._oval(
            x - p.mediastinum * 0.75, self.y - (p.apex + 0.36 * self.height), p.knob * 1.1, p.knob * 1.2, 0.0
        )
        strip = _step((np.float32(p.mediastinum) * (1 + 0.5 * _step((self.y + 0.25) * 4)) - np.abs(x)) * 28)
        return np.maximum.reduce([left, right, knob, strip * _step((np.float32(floor + 0.3) - self.y) * 20)])

    def _oval(self, x: Array, y: Array, rx: float, ry: float, lean: float) -> Array:
        u = (x - np.float32(lean * 0.5) * y) / np.float32(rx)
        v = (y + np.float32(lean * 0.25) * x) / np.float32(ry)
        return _step((1 - np.sqrt(u * u + v * v)) * np.float32(18 * rx))

    # Tissue

    def tissue(self) -> Array:
        """Chest wall, mediastinum, abdomen and air."""
        p, ax = self.p, np.abs(self.x)
        wide = np.float32(p.chest + 0.10 + 0.13 * p.soft)
        half = (
            np.float32(0.26)
            + (wide - np.float32(0.26)) * _step((self.y + np.float32(0.84)) * 6)
            + np.float32(0.12) * np.clip(self.y, 0, 1)
        )
        wall = np.sqrt(np.clip(1 - (ax / half) * (ax / half), 0, 1))
        density = np.float32(0.42 * p.soft) * np.sqrt(wall) + np.float32(0.52) * _step((half - ax) * 9)
        density += np.float32(0.10) * self.field.smooth(1, 5) * wall + np.float32(0.03) * self.field.smooth(2, 24)
        density -= self._air()
        density += np.float32(0.10) * self.heart + self._abdomen() + self._arms(ax, half)
        return density + self._breasts()

    def _air(self) -> Array:
        """What the lungs take away, with trachea; vessels are left standing in it."""
        open_lung = 1 - np.float32(0.86) * self.heart
        lungs = self.lungs["right"] + self.lungs["left"]
        depth = np.float32(0.44) + np.float32(0.10) * _bump(((self.down - 0.55) * 1.1) ** 2)
        air = lungs * open_lung * depth
        trachea = _bump(((self.x - np.float32(self.e.turn * 0.6)) * 19) ** 2) * _step(
            (np.float32(self.p.apex + 0.42) - self.y) * 8
        )
        return air + np.float32(0.13) * trachea - lungs * open_lung * self._vessels()

    def _vessels(self) -> Array:
        """Branching vessels from both hila; more and thicker with edema, none outside a collapsed lung."""
        lines = _Lines(self.frame)
        for side in ("right", "left"):
            s, hilum = _sign(side), (0.5 * self.p.mediastinum + 0.12, self.p.apex + 0.5 * self.height)
            for _ in range(9 + int(6 * self.f.edema)):
                self._branch(lines, s, hilum, self.hand.between(-1.3, 1.45), self.hand.between(0.18, 0.42))
        hila = sum(
            _bump(
                ((self.x - _sign(s) * np.float32(0.06 + self.p.mediastinum)) * 9) ** 2
                + ((self.y - np.float32(self.p.apex + 0.5 * self.height)) * 6.5) ** 2
            )
            for s in ("right", "left")
        )
        layer = lines.layer(0.7 + 0.5 * self.f.edema) * np.float32(0.22 + 0.12 * self.f.edema) + np.float32(0.16) * hila
        return layer * self._expanded() if self.f.pneumothorax else layer

    def _branch(self, lines: _Lines, s: int, start: Point, angle: float, length: float) -> None:
        bend = self.hand.between(-0.6, 0.6)
        x, y, width = start[0], start[1], 0.026
        for part in range(3):
            x2, y2 = x + math.cos(angle) * length / 2.5, y + math.sin(angle) * length / 2
            lines.line([(s * x, y), (s * x2, y2)], width, 0.85 - 0.2 * part)
            x, y, angle, width = x2, y2, angle + bend * 0.5, width * 0.62

    def _abdomen(self) -> Array:
        """Liver and spleen are thick; a gas bubble lies under the left dome."""
        below = _step((self.y - np.float32(self.base + 0.06)) * 6)
        gas = ((self.x - 0.26) * 5) ** 2 + ((self.y - np.float32(self.base + 0.16)) * 8) ** 2
        return np.float32(0.12) * below - np.float32(0.16) * _bump(gas) * below

    def _arms(self, ax: Array, half: Array) -> Array:
        if not self.p.arms:
            return np.zeros_like(ax)
        arm = (ax - half - np.float32(0.16)) * 7
        return np.float32(0.5) * np.sqrt(np.clip(1 - arm * arm, 0, 1)) * _step((self.y + np.float32(0.45)) * 8)

    def _breasts(self) -> Array:
        if not self.p.breast:
            return np.zeros_like(self.x)
        u = (np.abs(self.x) - np.float32(0.62 * self.p.chest)) * np.float32(3.2)
        v = (self.y - np.float32(self.base - 0.08)) * np.float32(3.4)
        return (
            np.float32(self.p.breast)
            * _step((1 - np.sqrt(u * u + v * v)) * 5)
            * (1 - np.float32(0.5) * np.clip(-v, 0, 1))
        )

    # Bones

    def bones(self) -> Array:
        """Ribs, clavicles, shoulder blades and spine."""
        ribs, spine = _Lines(self.frame), _Lines(self.frame)
        for side in (-1, 1):
            for number in range(10):
                self._rib(ribs, side, self.p.apex - 0.08 + number * self.p.rib_pitch * self.e.breath)
            self._shoulder(ribs, side)
        for number in range(13):
            self._vertebra(spine, self.p.apex - 0.22 + number * 0.125)
        layer = np.float32(0.17) * ribs.layer(0.8) * (1 - np.float32(0.75) * _step((self.y - np.float32(self.base + 0.04)) * 7)) + np.float32(0.22) * spine.layer(2.2)
        return np.float32(self.p.bone) * layer

    def _rib(self, lines: _Lines, side: int, top: float) -> None:
        """A posterior rib with brighter edges, and the fainter anterior one that crosses it."""
        edge = 1.05 * max(self.lateral_at((top + 0.12 - self.p.apex) / self.height), 0.2)
        fall = self.p.rib_slope

        def back(t: float) -> Point:
            return side * (0.05 + (edge - 0.05) * t), top - 0.10 * math.sin(math.pi * min(t * 0.9, 1)) + fall * t * t

        def front(t: float) -> Point:
            return side * (edge - (edge - 0.2) * t), top + fall + 0.02 + 0.17 * math.sin(math.pi / 2 * t)

        lines.line(_along(front), 0.05, 0.22)
        lines.line(_along(back), 0.052, 0.85)
        lines.line(_along(back), 0.03, 0.55)

    def _shoulder(self, lines: _Lines, side: int) -> None:
        p = self.p
        lines.line(
            _along(lambda t: (side * (0.06 + 0.72 * t), p.apex + 0.14 - 0.20 * t + 0.05 * math.sin(6.3 * t))), 0.06, 0.8
        )
        lines.polygon(
            [
                (side * (p.chest + 0.02), p.apex + 0.08),
                (side * (p.chest + 0.22), p.apex + 0.1),
                (side * (p.chest + 0.05), p.apex + 0.62),
            ],
            0.35,
        )
        lines.line(_along(lambda t: (side * (p.chest + 0.26), p.apex + 0.02 + 0.12 * t), 4), 0.16, 0.8)

    def _vertebra(self, lines: _Lines, y: float) -> None:
        x = self.p.curve * math.sin(3.2 * (y + 0.8))
        lines.polygon([(x - 0.075, y), (x + 0.075, y), (x + 0.08, y + 0.10), (x - 0.08, y + 0.10)], 0.6)
        for side in (-1, 1):
            lines.line([(x + side * 0.055, y + 0.03), (x + side * 0.055, y + 0.06)], 0.03, 1.0)

    # Findings

    def lung_findings(self) -> Array:
        """Consolidation, edema, fluid and free air, as changes of density."""
        density = self._edema()
        for number, _ in enumerate(self.f.opacities):
            density = np.maximum(density, self._opacity(number))
        fluid = self._fluid()
        density = density * (1 - fluid) + np.float32(0.46) * fluid
        return density + self._free_air() if self.f.pneumothorax else density

    def _room(self) -> Array:
        """Where air can be replaced."""
        return (self.lungs["right"] + self.lungs["left"]) * (1 - np.float32(0.8) * self.heart)

    def _opacity(self, number: int) -> Array:
        o = self.f.opacities[number]
        y = self.p.apex + self.height * (0.05 + 0.90 * o.down)
        x = _sign(o.side) * (0.12 + (self.lateral_at(0.05 + 0.90 * o.down) - 0.12) * o.across)
        rough = self.field.smooth(10 + 3 * number, 12)
        r2 = (((self.x - np.float32(x)) ** 2) * np.float32(1.25) + (self.y - np.float32(y)) ** 2) * np.float32(
            1 / (o.size * o.size)
        )
        patch = _step((1 - r2 + np.float32(0.9) * rough) * np.float32(1.1))
        broken = 1 + np.float32(0.2 + 0.6 * o.grain) * self.field.smooth(11 + 3 * number, 34)
        return (
            np.float32(0.30 * o.strength)
            * patch
            * np.clip(broken, 0, 2)
            * self._room()
            * _step(self.x * _sign(o.side) * 30)
        )

    def _edema(self) -> Array:
        """Haze around both hila with fine reticular lines and fluid-lined septa at the bases."""
        if not self.f.edema:
            return np.zeros_like(self.x)
        u = (np.abs(self.x) - np.float32(0.5 * self.p.chest)) / np.float32(0.62 * self.p.chest)
        v = (self.down - np.float32(0.62)) * np.float32(1.7)
        haze = _bump((u * u + v * v) * np.float32(0.8))
        net = np.abs(self.field.smooth(20, 46)) + np.abs(self.field.smooth(21, 70))
        return np.float32(self.f.edema) * self._room() * haze * (np.float32(0.10) + np.float32(0.20) * net)

    def _fluid(self) -> Array:
        """Share of the beam's air that fluid replaces, 0-1, with the meniscus that climbs the lateral wall."""
        total = np.zeros_like(self.x)
        for effusion in self.f.effusions:
            across = np.clip(self.x * _sign(effusion.side) / np.maximum(self.lateral, np.float32(0.1)), 0, 1.2)
            surface = self.base + self.p.dome * 0.9 - 0.10 - 0.50 * effusion.amount
            top = surface + np.float32(0.16) * (1 - across * across) + np.float32(0.02) * self.field.smooth(30, 9)
            total = np.maximum(total, _step((self.y - top) * np.float32(12)) * (self.lungs[effusion.side]))
        return total * (1 - np.float32(0.8) * self.heart)

    def _expanded(self) -> Array:
        """Mask: 0 where the pneumothorax has displaced the lung, 1 elsewhere."""
        assert self.f.pneumothorax is not None
        depth, side = self.f.pneumothorax.depth, self.f.pneumothorax.side
        t = np.clip(self.down - np.float32(0.22 * depth), 0, 1)
        rest = 1 - t
        edge = self.lateral * (1 - np.float32(depth) * (1 - np.float32(0.75) * t)) * np.sqrt(1 - rest**4)
        return 1 - _step((self.x * _sign(side) - edge) * 70) * (self.lungs[side] > 0.05)

    def _free_air(self) -> Array:
        """Darker pleural space, and the thin white line of the visceral pleura at its border."""
        inside = self._expanded()
        assert self.f.pneumothorax is not None
        line = 4 * inside * (1 - inside) * self.lungs[self.f.pneumothorax.side]
        return np.float32(0.15) * line - np.float32(0.07) * (1 - inside) * self._room()

    # Devices

    def devices(self) -> Array:
        """Tubes, lines and implants."""
        if not self.f.devices:
            return np.zeros_like(self.x)
        lines = _Lines(self.frame)
        for device in self.f.devices:
            _DEVICES[device.kind](lines, self, device)
        return np.float32(0.42) * lines.layer(0.5)


def _ett(lines: _Lines, body: _Body, device: Device) -> None:
    tip, x = body.p.apex + 0.34 + 0.05 * device.wobble, body.e.turn
    path = _along(lambda t: (x + 0.03 * device.wobble * (1 - t), -1.15 + (tip + 1.15) * t))
    lines.line(path, 0.036, 0.45)
    lines.line(path, 0.012, 0.85)


def _ng(lines: _Lines, body: _Body, device: Device) -> None:
    end = body.base + 0.22
    path = _along(
        lambda t: (
            0.03 * math.sin(5 * t + device.wobble) + 0.22 * max(0.0, t - 0.75) * 4 * (t > 0.75),
            -1.1 + (end + 1.1) * t,
        ),
        20,
    )
    lines.line(path, 0.018, 0.75)


def _central(lines: _Lines, body: _Body, device: Device, start: Point) -> None:
    s, tip = _sign(device.side), (-0.08 + body.e.turn, body.p.apex + 0.55 * body.height)
    knee = (s * 0.10 + 0.02 * device.wobble, body.p.apex + 0.14)
    first = _along(
        lambda t: (
            s * start[0] + (knee[0] - s * start[0]) * t,
            start[1] + (knee[1] - start[1]) * t + 0.04 * math.sin(3.14 * t) * device.wobble,
        ),
        8,
    )
    second = _along(lambda t: (knee[0] + (tip[0] - knee[0]) * math.sqrt(t), knee[1] + (tip[1] - knee[1]) * t), 10)
    lines.line(first + second, 0.015, 0.8)


def _cvc(lines: _Lines, body: _Body, device: Device) -> None:
    _central(lines, body, device, (0.20, -1.05))


def _picc(lines: _Lines, body: _Body, device: Device) -> None:
    _central(lines, body, device, (1.0, body.p.apex + 0.30))


def _pacemaker(lines: _Lines, body: _Body, device: Device) -> None:
    s, x, y = _sign(device.side), 0.52 + 0.04 * device.wobble, body.p.apex + 0.24
    lines.line([(s * (x - 0.045), y), (s * (x + 0.045), y + 0.03)], 0.13, 0.95)
    apex = (body.e.turn + 0.24 * body.p.chest, body.base - 0.10)
    atrium = (body.e.turn - 0.14, body.base - 0.34)
    for tip in (apex, atrium):
        lead = [
            (s * x, y - 0.05),
            (s * 0.28, body.p.apex + 0.12),
            (-0.02, body.p.apex + 0.25),
            (-0.09, body.p.apex + 0.5),
            (-0.08, body.base - 0.28),
            tip,
        ]
        lines.line(_smooth(lead), 0.014, 0.8)


def _drain(lines: _Lines, body: _Body, device: Device) -> None:
    s, x = _sign(device.side), body.p.chest
    start, end = (
        (1.15 * x, body.base - 0.1),
        (0.55 * x + 0.1 * device.wobble * x, body.p.apex + (0.25 + 0.2 * device.wobble) * body.height),
    )
    path = _along(lambda t: (s * (start[0] + (end[0] - start[0]) * t), start[1] + (end[1] - start[1]) * math.sqrt(t)))
    lines.line(path, 0.034, 0.55)
    lines.line(path, 0.010, 0.95)


def _smooth(points: Points) -> Points:
    """Corner-cut a polyline twice (Chaikin)."""
    for _ in range(2):
        cut = [
            (a[0] * u + b[0] * (1 - u), a[1] * u + b[1] * (1 - u))
            for a, b in zip(points, points[1:], strict=False)
            for u in (0.75, 0.25)
        ]
        points = [points[0], *cut, points[-1]]
    return points


_DEVICES: dict[str, Callable[[_Lines, _Body, Device], None]] = {
    "ett": _ett,
    "ng": _ng,
    "cvc": _cvc,
    "picc": _picc,
    "pacemaker": _pacemaker,
    "drain": _drain,
}


def _develop(density: Array, case: Case) -> Array:
    """Density to grey levels: beam edge, tone curve, blur, noise, marker, padding, rounding."""
    e, field = case.exposure, _Field(case)
    z = (density - np.float32(e.level) + np.float32(0.10) * field.smooth(40, 3)) * np.float32(e.gain)
    grey = np.float32(127.5) * (1 + z / np.sqrt(1 + z * z))
    grey = gaussian_filter(grey, e.blur, truncate=2.5) + np.float32(e.noise) * field.grain(41)
    if e.marker:
        grey = np.maximum(grey, 235 * _marker(case))
    edge = round(e.collimation * SIZE)
    across, down = edge + round(e.bars[0] * SIZE), edge + round(e.bars[1] * SIZE)
    film = np.zeros_like(grey)
    film[down : SIZE - down, across : SIZE - across] = grey[down : SIZE - down, across : SIZE - across]
    return np.rint(np.clip(film, 0, 255))


def _marker(case: Case) -> Array:
    lines = _Lines(_Frame(case.exposure))
    x, y = 0.70, case.patient.apex - 0.02
    lines.line([(x, y - 0.05), (x, y + 0.05), (x + 0.05, y + 0.05)], 0.022, 1.0)
    return lines.layer()
