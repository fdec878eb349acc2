"""Draw a case as a chest film: densities along the beam, then what a digital detector makes of them."""

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from ingest.phantom_body import Body
from ingest.phantom_canvas import SIZE, Array, Field, Frame, Lines
from ingest.phantom_case import Case
from ingest.phantom_findings import devices, lung_findings


def draw_film(case: Case) -> Array:
    """The film of a case: float32 (320, 320), whole numbers 0..255."""
    body = Body(case)
    density = body.tissue() + body.bones() + lung_findings(body) + devices(body)
    return _develop(density, case)


def _develop(density: Array, case: Case) -> Array:
    """Density to grey levels: beam edge, tone curve, blur, noise, marker, padding, rounding."""
    e, field = case.exposure, Field(case)
    even = density - np.float32(0.5) * (_coarse(density) - np.float32(0.75))
    z = (even - np.float32(e.level) + np.float32(0.10) * field.smooth(40, 3)) * np.float32(1.4 * e.gain)
    grey = np.float32(127.5) * (1 + z / np.sqrt(1 + z * z))
    grey = gaussian_filter(grey, e.blur, truncate=2.5) + np.float32(e.noise) * field.grain(41)
    if e.marker:
        grey = np.maximum(grey, 235 * _marker(case))
    edge = round(e.collimation * SIZE)
    across, down = edge + round(e.bars[0] * SIZE), edge + round(e.bars[1] * SIZE)
    film = np.zeros_like(grey)
    film[down : SIZE - down, across : SIZE - across] = grey[down : SIZE - down, across : SIZE - across]
    return np.rint(np.clip(film, 0, 255))


def _coarse(density: Array) -> Array:
    """The density blurred widely, for the dynamic range compression that digital detectors apply."""
    small = np.ascontiguousarray(density.reshape(SIZE // 4, 4, SIZE // 4, 4).mean((1, 3)))
    blurred = Image.fromarray(gaussian_filter(small, 3.5, truncate=2.5))
    return np.asarray(blurred.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def _marker(case: Case) -> Array:
    lines = Lines(Frame(case.exposure))
    x, y = 0.70, case.patient.apex - 0.02
    lines.line([(x, y - 0.05), (x, y + 0.05), (x + 0.05, y + 0.05)], 0.022, 1.0)
    return lines.layer()
