"""What is wrong, or in the patient, on the phantom's film: changes of density over the healthy body.

Consolidation, edema and fluid replace air; a pneumothorax takes the lung's markings away beyond a thin white line;
tubes and implants are drawn lines, denser than bone.
"""

import math
from collections.abc import Callable

import numpy as np

from ingest.phantom_body import Body
from ingest.phantom_canvas import Array, Lines, Point, along, bump, rounded, sign, step
from ingest.phantom_case import Device


def lung_findings(body: Body) -> Array:
    """Consolidation, edema, fluid and free air, as changes of density."""
    density = _edema(body)
    for number, _ in enumerate(body.f.opacities):
        density = np.maximum(density, _opacity(body, number))
    fluid = _fluid(body)
    density = density * (1 - fluid) + 0.54 * fluid
    return density + _free_air(body) if body.f.pneumothorax else density


def _opacity(body: Body, number: int) -> Array:
    """A ragged patch that fills air spaces of one lung."""
    o = body.f.opacities[number]
    y = body.p.apex + body.height * (0.05 + 0.90 * o.down)
    x = sign(o.side) * (0.12 + (body.lateral_at(0.05 + 0.90 * o.down) - 0.12) * o.across)
    rough = body.field.smooth(10 + 3 * number, 12)
    r2 = (((body.x - x) ** 2) * 1.25 + (body.y - y) ** 2) * (1 / (o.size * o.size))
    patch = step((1 - r2 + 0.9 * rough) * 1.1)
    broken = 1 + (0.2 + 0.6 * o.grain) * body.field.smooth(11 + 3 * number, 34)
    return 0.55 * o.strength * patch * np.clip(broken, 0, 2) * body.room() * step(body.x * sign(o.side) * 30)


def _edema(body: Body) -> Array:
    """Haze around both hila with fine reticular lines and fluid-lined septa at the bases."""
    if not body.f.edema:
        return np.zeros_like(body.x)
    u = (np.abs(body.x) - 0.5 * body.p.chest) / (0.62 * body.p.chest)
    v = (body.down - 0.62) * 1.7
    haze = bump((u * u + v * v) * 0.8)
    net = np.abs(body.field.smooth(20, 46)) + np.abs(body.field.smooth(21, 70))
    return body.f.edema * body.room() * haze * (0.10 + 0.20 * net)


def _fluid(body: Body) -> Array:
    """Share of the beam's air that fluid replaces, 0-1, with the meniscus that climbs the lateral wall."""
    total = np.zeros_like(body.x)
    for effusion in body.f.effusions:
        across = np.clip(body.x * sign(effusion.side) / np.maximum(body.lateral, 0.1), 0, 1.2)
        surface = body.base + body.p.dome * 0.9 - 0.10 - 0.58 * effusion.amount
        top = surface + 0.16 * (1 - across * across) + 0.02 * body.field.smooth(30, 9)
        total = np.maximum(total, step((body.y - top) * 12) * body.lungs[effusion.side])
    return total * (1 - 0.8 * body.heart)


def _free_air(body: Body) -> Array:
    """Darker pleural space, and the thin white line of the visceral pleura at its border."""
    inside = body.expanded()
    assert body.f.pneumothorax is not None
    line = 4 * inside * (1 - inside) * body.lungs[body.f.pneumothorax.side]
    return 0.45 * line - 0.22 * (1 - inside) * body.room()


def devices(body: Body) -> Array:
    """Tubes, lines and implants."""
    if not body.f.devices:
        return np.zeros_like(body.x)
    lines = Lines(body.frame)
    for device in body.f.devices:
        _DEVICES[device.kind](lines, body, device)
    return 0.75 * lines.layer(0.4)


def _ett(lines: Lines, body: Body, device: Device) -> None:
    tip, x = body.p.apex + 0.34 + 0.05 * device.wobble, body.e.turn
    path = along(lambda t: (x + 0.03 * device.wobble * (1 - t), -1.15 + (tip + 1.15) * t))
    lines.line(path, 0.044, 0.45)
    lines.line(path, 0.016, 0.85)


def _ng(lines: Lines, body: Body, device: Device) -> None:
    end = body.base + 0.22
    path = along(
        lambda t: (
            0.03 * math.sin(5 * t + device.wobble) + 0.22 * max(0.0, t - 0.75) * 4 * (t > 0.75),
            -1.1 + (end + 1.1) * t,
        ),
        20,
    )
    lines.line(path, 0.022, 0.75)


def _central(lines: Lines, body: Body, device: Device, start: Point) -> None:
    s, tip = sign(device.side), (-0.08 + body.e.turn, body.p.apex + 0.55 * body.height)
    knee = (s * 0.10 + 0.02 * device.wobble, body.p.apex + 0.14)
    first = along(
        lambda t: (
            s * start[0] + (knee[0] - s * start[0]) * t,
            start[1] + (knee[1] - start[1]) * t + 0.04 * math.sin(3.14 * t) * device.wobble,
        ),
        8,
    )
    second = along(lambda t: (knee[0] + (tip[0] - knee[0]) * math.sqrt(t), knee[1] + (tip[1] - knee[1]) * t), 10)
    lines.line(first + second, 0.021, 0.8)


def _cvc(lines: Lines, body: Body, device: Device) -> None:
    _central(lines, body, device, (0.20, -1.05))


def _picc(lines: Lines, body: Body, device: Device) -> None:
    _central(lines, body, device, (1.0, body.p.apex + 0.30))


def _pacemaker(lines: Lines, body: Body, device: Device) -> None:
    s, x, y = sign(device.side), 0.52 + 0.04 * device.wobble, body.p.apex + 0.24
    lines.line([(s * (x - 0.045), y), (s * (x + 0.045), y + 0.03)], 0.15, 0.95)
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
        lines.line(rounded(lead), 0.019, 0.8)


def _drain(lines: Lines, body: Body, device: Device) -> None:
    s, x = sign(device.side), body.p.chest
    start, end = (
        (1.15 * x, body.base - 0.1),
        (0.55 * x + 0.1 * device.wobble * x, body.p.apex + (0.25 + 0.2 * device.wobble) * body.height),
    )
    path = along(lambda t: (s * (start[0] + (end[0] - start[0]) * t), start[1] + (end[1] - start[1]) * math.sqrt(t)))
    lines.line(path, 0.042, 0.55)
    lines.line(path, 0.014, 0.95)


_DEVICES: dict[str, Callable[[Lines, Body, Device], None]] = {
    "ett": _ett,
    "ng": _ng,
    "cvc": _cvc,
    "picc": _picc,
    "pacemaker": _pacemaker,
    "drain": _drain,
}
