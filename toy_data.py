# SPDX-License-Identifier: MIT
"""A small world of tones whose truth is known: the data, the ears and the measures of presto.py.

Text-to-music needs a data set, a text encoder and trained listeners. Here are tones (part 1), an
ear that hears them (2), names for them (3), measures of quality (4), and a page to show them (5).
"""

import base64
import difflib
import html
import io
import math

import soundfile
import torch

# THE CONTRACT: what a data module must offer to presto.py. Write another to bring your own sounds.
#   SAMPLE_RATE in hertz, and CLIP_SAMPLES, the length of a clip; all tensors are on the CPU
#   PROMPTS, a list of names, one for each class; a label is an index into it
#   make_batch(count, generator=None, labels=None) -> waves (count, CLIP_SAMPLES), labels (count,)
# These are optional. Without them, the figures that need them are left out:
#   listen(wave) -> a dict of finite tensors (batch,): any figures of what is heard
#   HEARD, beside `listen`: a dict from its names to their units: what `measure` compares
#   is_correct(wave, labels) -> booleans (batch,): does each clip sound as its label says?
#   describe(wave) -> a list of strings, one for each clip: what is heard, in words
#   misname(labels) -> wrong labels, on the device of `labels`; without it, all captions are right
# Parts 1 to 3 are such a module. Parts 4 and 5 know nothing of tones: they work with any `world`.

# ---- 1. Making tones ----------------------------------------------------------------------------
SAMPLE_RATE = 8000  # hertz
CLIP_SAMPLES = 8192  # 1.024 seconds; a power of two suits every stride and every FFT
PITCHES = ["A3", "A#3", "B3", "C4", "C#4", "D4", "D#4", "E4", "F4", "F#4", "G4", "G#4"]
PITCH_HZ = 220.0 * 2.0 ** (torch.arange(12) / 12)  # below one octave: none is another's overtone
TIMBRES = ["sine", "organ", "square", "saw"]
PROMPTS = [f"{pitch} {timbre}" for pitch in PITCHES for timbre in TIMBRES]  # 48 classes
# A timbre's index is (second harmonic?) + 2 * (third harmonic?), which an ear can decide:
#                      no third harmonic      third harmonic
#   no second harmonic       sine                square
#   second harmonic          organ               saw
K = torch.arange(1, 7, dtype=torch.float32)  # harmonics; 6 x 415 Hz is below Nyquist, 4 kHz
HARMONICS = torch.stack([
    (K == 1).float(),  # sine: the fundamental alone
    (K == 1) + 0.6 * (K == 2) + 0.3 * (K == 4),  # organ: octaves
    (K % 2 == 1) * K**-0.8,  # square: odd harmonics
    K**-0.8,  # saw: all harmonics
])  # (timbre, harmonic)

def make_batch(count, generator=None, labels=None):
    """Draw `count` tones: waveforms (count, CLIP_SAMPLES) in about [-1, 1], and labels (count,).

    Labels are uniform unless given. Within a class four factors vary, so that a model which only
    learnt the mean of a class is found out. `generator` is a torch.Generator on the CPU.
    """
    if labels is None:
        labels = torch.randint(len(PROMPTS), (count,), generator=generator)
    u = torch.rand(4, count, 1, generator=generator)
    loudness = 0.10 * 3.5 ** u[0]  # RMS at full level, 0.10 to 0.35: a range of 11 dB
    attack = 0.005 * 20.0 ** u[1]  # seconds, 5 to 100 ms
    decay = 0.12 * 6.0 ** u[2]  # seconds in which the level falls to 1/e, 0.12 to 0.72
    tilt = 0.6 * u[3]  # brightness: harmonic k is weakened by k^-tilt
    t = torch.arange(CLIP_SAMPLES) / SAMPLE_RATE  # (time,) in seconds
    phase = 2 * math.pi * PITCH_HZ[labels // len(TIMBRES)][:, None] * t  # (count, time)
    amplitude = HARMONICS[labels % len(TIMBRES)] * K**-tilt  # (count, harmonic)
    amplitude = amplitude / amplitude.square().sum(1, keepdim=True).sqrt() * math.sqrt(2)  # RMS 1
    # Chebyshev's recurrence makes each harmonic from the two before it, with no further sine:
    # sin((k + 1) p) = 2 cos(p) sin(k p) - sin((k - 1) p).
    previous = torch.zeros_like(phase)
    current = phase.sin()
    twice_cosine = 2 * phase.cos()
    wave = amplitude[:, :1] * current
    for k in range(1, len(K)):
        previous, current = current, twice_cosine * current - previous
        wave = wave + amplitude[:, k : k + 1] * current
    # With the factor 3 the tone has 95 % of its level at t = attack, because 1 - e^-3 = 0.95.
    envelope = (1 - torch.exp(-3 * t / attack)) * torch.exp(-t / decay)
    return loudness * envelope * wave, labels


# ---- 2. Listening -------------------------------------------------------------------------------
HEARD = {"loudness": "dB", "attack": "ms", "decay": "dB/s", "brightness": "%"}
ENVELOPE_FRAMES = 64  # frames of 128 samples, 16 ms

def listen(wave):
    """Hear clips (batch, time). Returns a dict of tensors (batch,):

    hz: the fundamental. pitch, cents: the nearest index into PITCHES, and the distance to it.
    timbre: an index into TIMBRES. tonal: the share of the energy on the six harmonics.
    haze: the energy on none of the six harmonics, in dB of the whole, at least -60. It matters
        because the noise floor of a generated clip is what an ear hears first.
    loudness: dB of the loudest 16 ms. attack: ms to 80 % of the peak amplitude, in steps of 16.
    decay: dB/s after the peak. brightness: % of the harmonics' energy above the third.
    """
    wave = wave.float().cpu()
    power = torch.fft.rfft(wave * torch.hann_window(wave.shape[-1])).abs().square()  # (batch, bin)
    bin_hz = SAMPLE_RATE / wave.shape[-1]
    hz_of_bin = torch.arange(power.shape[-1]) * bin_hz
    energy_below = torch.nn.functional.pad(power.cumsum(-1, dtype=torch.float64), (1, 0))
    # Pitch: in every timbre the fundamental is the strongest harmonic. So look for the loudest bin
    # in a range a little wider than PITCHES, and take the centroid of what lies around it.
    in_range = (hz_of_bin > 208) & (hz_of_bin < 430)
    peak_hz = hz_of_bin[(power * in_range).argmax(-1)][:, None]
    near = power * ((hz_of_bin - peak_hz).abs() < 14)
    hz = (near * hz_of_bin).sum(-1) / near.sum(-1).clamp_min(1e-20)
    semitones = 12 * torch.log2(hz.clamp_min(1.0) / PITCH_HZ[0])
    pitch = semitones.round().clamp(0, len(PITCHES) - 1)
    # Timbre: the energy of each harmonic is what lies within 3 % of its frequency. Each threshold
    # is about half of the weakest amplitude that a real tone has there.
    centres = hz[:, None] * K  # (batch, harmonic)
    first = (centres * 0.97 / bin_hz).round().long().clamp(0, power.shape[-1])
    end = (centres * 1.03 / bin_hz).round().long().clamp(0, power.shape[-1])
    harmonic = energy_below.gather(1, end) - energy_below.gather(1, first)
    amplitude = (harmonic / harmonic[:, :1].clamp_min(1e-20)).sqrt()  # the fundamental has 1
    timbre = (amplitude[:, 1] > 0.18).long() + 2 * (amplitude[:, 2] > 0.10).long()
    tonal = harmonic.sum(-1) / energy_below[:, -1].clamp_min(1e-20)
    bright = harmonic[:, 3:].sum(-1) / harmonic.sum(-1).clamp_min(1e-20)
    # Envelope: 1.94 dB below the top is 80 % of the peak, because 20 log10(0.8) = -1.94.
    frames = wave.unflatten(-1, (ENVELOPE_FRAMES, -1)).square().mean(-1)  # (batch, frame)
    level = 10 * frames.clamp_min(1e-10).log10()  # dB
    seconds = torch.arange(ENVELOPE_FRAMES) * (wave.shape[-1] / ENVELOPE_FRAMES / SAMPLE_RATE)
    top, top_frame = level.max(-1, keepdim=True)
    attack = seconds[(level > top - 1.94).int().argmax(-1)]
    # Decay: the slope of a line that is fitted to the level after the peak, down to 30 dB below it.
    after = (torch.arange(ENVELOPE_FRAMES) >= top_frame) & (level > top - 30)
    weight = after / after.sum(-1, keepdim=True)
    x = seconds - (weight * seconds).sum(-1, keepdim=True)
    y = level - (weight * level).sum(-1, keepdim=True)
    slope = (weight * x * y).sum(-1) / (weight * x * x).sum(-1).clamp_min(1e-9)
    haze = 10 * (1 - tonal).clamp_min(1e-6).log10()
    return {
        "hz": hz, "pitch": pitch.long(), "cents": 100 * (semitones - pitch), "timbre": timbre,
        "tonal": tonal.float(), "haze": haze.float(), "loudness": top[:, 0],
        "attack": 1000 * attack, "decay": -slope, "brightness": 100 * bright.float(),
    }

def is_correct(wave, labels):
    """Which clips (batch, time) sound as their labels (batch,) say: booleans (batch,)."""
    heard = listen(wave)
    same = heard["pitch"] * len(TIMBRES) + heard["timbre"] == labels.cpu()
    return same & (heard["cents"].abs() <= 50) & (heard["tonal"] > 0.5)  # noise is not correct


# ---- 3. Naming ----------------------------------------------------------------------------------
def describe(wave):
    """What is heard in clips (batch, time): "A3 saw +2 cents", or "noise". A list of strings."""
    heard = listen(wave)
    names = []
    for index, tonal in enumerate(heard["tonal"]):
        name = f"{PITCHES[heard['pitch'][index]]} {TIMBRES[heard['timbre'][index]]}"
        cents = round(heard["cents"][index].item())
        names.append(f"{name} {cents:+d} cents" if tonal > 0.5 else "noise")
    return names


def misname(labels):
    """Wrong captions, such as a careless person writes: the pitch is right, the timbre is not."""
    timbre = (labels + torch.randint_like(labels, 1, len(TIMBRES))) % len(TIMBRES)
    return labels - labels % len(TIMBRES) + timbre


# ---- 4. Measuring how far clips are from real ones ----------------------------------------------
# The paper embeds music with networks that must be downloaded. Here an embedding is the log energy
# in 24 bands, early and late in the clip. It sees the region of the pitch, timbre, brightness,
# attack and decay. It does not see single semitones (`is_correct` does) or phase (no ear does).
def embed(wave, sample_rate):
    """Waveforms (batch, 1024 samples or more) -> embeddings (batch, 48): log10 of energies."""
    wave = wave.float().cpu()
    size = max(512, 2 ** round(math.log2(0.064 * sample_rate)))  # frames of about 64 ms
    size = min(size, 2 ** int(math.log2(wave.shape[-1] / 2)))  # three frames or more
    window = torch.hann_window(size)
    spectrum = torch.stft(wave, size, size // 2, window=window, return_complex=True, center=False)
    power = spectrum.abs().square() / (size / 4) ** 2  # a full-scale sine peaks at 1
    hz = torch.arange(size // 2 + 1) * (sample_rate / size)
    mel = 2595 * torch.log10(1 + hz / 700)  # the mel scale: bands are narrow where pitch lives
    centres = torch.linspace(mel[10], mel[-1], 24)  # bin 10 is at 156 Hz here
    bank = 1 - (mel - centres[:, None]).abs() / (centres[1] - centres[0])
    energy = bank.clamp_min(0) @ power  # the bank's triangles (band, bin) -> (batch, band, frame)
    third = energy.shape[-1] // 3
    parts = [energy[..., :third].mean(-1), energy[..., third:].mean(-1)]
    return (torch.cat(parts, -1) + 1e-4).log10()  # what is fainter than -40 dB counts as silence

def frechet_distance(a, b):
    """Frechet distance of embeddings (n, d), (m, d): |mean gap|^2 + tr(A + B - 2 (AB)^(1/2)).

    It compares Gaussians fitted to the sets, over all classes together (Heusel et al. 2017). Real
    sets of n tones get about 26 / n, so 0.03 for 768. It hardly sees a collapse, because classes
    differ more than their clips: if each class repeats one clip, FD is 0.4. Recall sees it at once.
    """
    cov_a = torch.cov(a.double().T)
    cov_b = torch.cov(b.double().T)
    cross = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()  # tr (AB)^(1/2)
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return (gap + cov_a.trace() + cov_b.trace() - 2 * cross).item()

def mmd(a, b):
    """Squared maximum mean discrepancy of embeddings (n, d), (m, d), times 1000 (Gretton 2012).

    The Gaussian kernel is as wide as the median distance within b, the reference: too wide to see
    variety within a class. Independent real sets get 0 on average. Here both sets have the same
    count of each class, so real ones get a little less: -0.9 for 768 tones.
    """
    width = torch.pdist(b).median().clamp_min(1e-9)  # above zero even if all clips are silent
    distances = [torch.pdist(a), torch.pdist(b), torch.cdist(a, b)]
    within_a, within_b, between = [(-(d / width).square() / 2).exp().mean() for d in distances]
    return 1000 * (within_a + within_b - 2 * between).item()

def recall_coverage(fake, real, k=5):
    """How much of the real embeddings (m, d) the fake ones (n, d) reach: two shares.

    A point's neighbourhood reaches to the k-th nearest of its own set. Recall: the share of real
    points in a fake point's neighbourhood (Kynkaanniemi et al. 2019). Coverage: the share of real
    points whose neighbourhood holds a fake one (Naeem et al. 2020). Neither punishes bad fakes.
    Of clips repeated more than k times, the k-th nearest is at distance 0: so recall is 0.
    """
    k = min(k, len(fake) - 1, len(real) - 1) + 1  # the nearest point is the point itself
    radius_fake = torch.cdist(fake, fake).kthvalue(k, dim=1).values
    radius_real = torch.cdist(real, real).kthvalue(k, dim=1).values
    distance = torch.cdist(real, fake)  # (real, fake)
    recall = (distance < radius_fake).any(1).double().mean().item()
    coverage = (distance < radius_real[:, None]).any(1).double().mean().item()
    return recall, coverage

def wasserstein(a, b):
    """Wasserstein-1 distance of two samples (n,), (m,) of one figure, in the unit of the figure.

    It is how far values must move, on average, to turn one sample into the other. It sees any
    difference over all classes together, but hardly whether clips of the same class differ.
    """
    a = a.double().sort().values
    b = b.double().sort().values
    points = torch.cat([a, b]).sort().values
    below_a = torch.searchsorted(a, points[:-1], right=True).double() / len(a)
    below_b = torch.searchsorted(b, points[:-1], right=True).double() / len(b)
    return ((below_a - below_b).abs() * points.diff()).sum().item()

def within_class_std(values, labels):
    """Root of the mean over classes of the variance of values (batch,) within each class."""
    classes = [values[labels == label].double() for label in labels.unique()]
    variances = [group.var() for group in classes if len(group) > 1]  # one clip has none
    return torch.stack(variances).mean().sqrt().item() if variances else 0.0

class Reference:
    """Real clips (batch, time) with labels (batch,), to compare with."""
    def __init__(self, world, wave, label):
        self.embedded = embed(wave, world.SAMPLE_RATE).double()  # (batch, feature)
        member = torch.nn.functional.one_hot(label, len(world.PROMPTS)).double()  # (batch, class)
        self.class_mean = member.T @ self.embedded / member.sum(0).clamp_min(1)[:, None]
        self.centred = self.embedded - self.class_mean[label]
        self.heard = world.listen(wave) if hasattr(world, "listen") else {}
        if "loudness" in self.heard:
            self.loudness_std = within_class_std(self.heard["loudness"], label)

def measure(world, wave, label, reference):
    """Clips (batch, time) with labels (batch,) against a Reference: a dict of floats.

    accuracy: the share that `is_correct`; it does not see variety or sound quality.
    recall, coverage: of embeddings minus the reference's class mean: variety within classes.
    fd, mmd: of plain embeddings. W_...: `wasserstein` for the names in `world.HEARD`.
    loudness, haze: means in dB, which do not see how clips differ around them.
    spread: the deviation of loudness within classes over the real one; 1 is right, 0 a collapse.
    """
    embedded = embed(wave, world.SAMPLE_RATE).double()
    heard = world.listen(wave) if hasattr(world, "listen") else {}
    figures = {}
    if hasattr(world, "is_correct"):
        figures["accuracy"] = world.is_correct(wave, label).double().mean().item()
    centred = embedded - reference.class_mean[label]
    figures["recall"], figures["coverage"] = recall_coverage(centred, reference.centred)
    figures["fd"] = frechet_distance(embedded, reference.embedded)
    figures["mmd"] = mmd(embedded, reference.embedded)
    for name in getattr(world, "HEARD", {}):
        figures["W_" + name] = wasserstein(heard[name], reference.heard[name])
    if "loudness" in heard:
        figures["loudness"] = heard["loudness"].mean().item()
        if reference.loudness_std > 0:
            figures["spread"] = within_class_std(heard["loudness"], label) / reference.loudness_std
    if "haze" in heard:
        figures["haze"] = heard["haze"].mean().item()
    return figures


# ---- 5. Prompts, tables, plots, and a page to see and hear clips --------------------------------
def parse_prompt(text, prompts):
    """A class's name -> [its label], or "all" -> every label. Case and spaces do not matter."""
    wanted = " ".join(text.lower().split())
    names = [name.lower() for name in prompts]
    if wanted == "all":
        return list(range(len(prompts)))
    if wanted in names:
        return [names.index(wanted)]
    # Compare with sorted words, so that "saw A3" suggests "A3 saw".
    tidy = [" ".join(sorted(name.split())) for name in names]
    near = difflib.get_close_matches(" ".join(sorted(wanted[:40].split())), tidy, 1)
    guess = f"did you mean {prompts[tidy.index(near[0])]!r}? " if near else ""
    raise ValueError(f"unknown prompt {text[:40]!r}: {guess}Examples: {prompts[0]!r}, 'all'")

def wav_bytes(wave, sample_rate):
    """A mono waveform (time,) in [-1, 1] as the bytes of a WAV file, PCM 16."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave.float().cpu().numpy(), sample_rate, "PCM_16", format="WAV")
    return buffer.getvalue()

COLUMNS = {  # figure: (heading, format); others keep six letters, and have two decimals
    "accuracy": ("acc", ".3f"), "recall": ("recall", ".3f"), "coverage": ("cover", ".3f"),
    "fd": ("fd", ".3f"), "loudness": ("loud", ".1f"), "haze": ("haze", ".1f"),
    "alone": ("alone", ".1f"), "batch": ("batch", ".1f"),
}

def table(rows):
    """{title: {figure: number}} -> a list of lists of strings, headings first; "" if missing."""
    figures = list(dict.fromkeys(figure for row in rows.values() for figure in row))
    style = {figure: COLUMNS.get(figure, (figure[:6], ".2f")) for figure in figures}
    lines = [["", *(style[figure][0] for figure in figures)]]
    for title, row in rows.items():
        lines.append([title, *(format(row[f], style[f][1]) if f in row else "" for f in figures)])
    return lines

def aligned(lines):
    """The lines of `table` as text for a terminal."""
    first, *widths = [max(map(len, column)) for column in zip(*lines)]
    text = []
    for title, *cells in lines:
        text.append(title.ljust(first) + "".join(f"  {c:>{w}}" for c, w in zip(cells, widths)))
    return "\n".join(text)

ROUND = [digit * 10.0**exponent for exponent in range(-30, 31) for digit in (1, 2, 5)]
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#b0468a", "#7a5c00", "#444444"]
MARKERS = ["M-4-4h8v8h-8z", "M0-6L6 5H-6z", "M0-6L6 0L0 6L-6 0z", "M0 6L6-5H-6z", "M-2-6h4V6h-4z"]

def axis(values, log, start, end):
    """A few round ticks that enclose the values, and a function from a value to its pixel."""
    values = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    low = min(values, default=1)
    high = max(values, default=1)
    if low == high:
        high = low + (abs(low) or 1)
    step = next(step for step in ROUND if high - low <= 6 * step)
    ticks = [step * i for i in range(math.floor(low / step), math.ceil(high / step) + 1)]
    if log:
        neighbours = zip(ROUND, ROUND[1:], ROUND[2:])  # and one tick beyond each end
        ticks = [tick for before, tick, after in neighbours if before < high and after > low]
    def pixel(value):
        if log and value <= 0:
            return math.nan
        first, last, here = [math.log(v) if log else v for v in (ticks[0], ticks[-1], value)]
        return start + (end - start) * (here - first) / (last - first)
    return ticks, pixel

def line_plot(title, x_label, y_label, curves, log_x=False, log_y=False):
    """An SVG picture, as a string, of curves {name: [(x, y, optional text), ...]}."""
    x_ticks, x_pixel = axis([p[0] for curve in curves.values() for p in curve], log_x, 60, 500)
    y_ticks, y_pixel = axis([p[1] for curve in curves.values() for p in curve], log_y, 350, 60)
    svg = ['<rect width="720" height="400" fill="white"/>']  # readable on a dark page too
    def text(x, y, words, style=""):
        svg.append(f'<text x="{x:.1f}" y="{y:.1f}" style="{style}">{html.escape(words)}</text>')
    text(280, 20, title, "font-weight:bold")
    text(280, 390, x_label)
    text(8, 44, y_label, "text-anchor:start")
    for tick in x_ticks:
        svg.append(f'<path d="M{x_pixel(tick):.1f} 60V350" stroke="#ddd"/>')
        text(x_pixel(tick), 368, f"{tick:g}")
    for tick in y_ticks:
        svg.append(f'<path d="M60 {y_pixel(tick):.1f}H500" stroke="#ddd"/>')
        text(52, y_pixel(tick) + 4, f"{tick:g}", "text-anchor:end")
    for index, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        opened = f'<path fill="{colour}" d="{MARKERS[index % len(MARKERS)]}" transform="translate'
        points = [(x_pixel(x), y_pixel(y), "".join(words)) for x, y, *words in curve]
        points = [p for p in points if math.isfinite(p[0] + p[1])]  # a log axis cannot show zero
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
        svg.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, words in points:
            svg.append(f'{opened}({x:.1f} {y:.1f})"/>')
            text(x, y - 10, words, f"fill:{colour}")
        svg.append(f'{opened}(520 {70 + 22 * index})"/>')
        text(532, 75 + 22 * index, name, f"fill:{colour};text-anchor:start")
    look = f'role="img" aria-label="{html.escape(title)}" font-family="sans-serif" font-size="13"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" width="720" viewBox="0 0 720 400" {look}'
    return start + ' text-anchor="middle">' + "".join(svg) + "</svg>"

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>%(title)s</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 76rem; margin: auto; padding: 1rem }
:root { color-scheme: light dark } table { border-collapse: collapse; white-space: nowrap }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #8886 }
th:first-child { text-align: left; position: sticky; left: 0; background: Canvas }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem }
canvas, audio { width: 100%%; display: block } canvas { height: 7rem } svg { max-width: 100%% }
figure { margin: 0 }</style><h1>%(title)s</h1><p>%(intro)s</p>%(body)s<script>
for (const canvas of document.querySelectorAll("canvas")) {  // a byte a pixel, from the top left
  const values = Array.from(atob(canvas.dataset.pixels), letter => letter.charCodeAt(0));
  const rgba = Uint8ClampedArray.from(values.flatMap(v => [2 * v, 2 * v - 200, 60 + v / 3, 255]));
  canvas.getContext("2d").putImageData(new ImageData(rgba, canvas.width), 0, 0);
}
</script></html>"""

def page(title, intro, lines, pictures, groups, sample_rate):
    """One HTML page, as a string, that needs no other file. `lines` are those of `table`, or [].

    pictures: SVG strings. groups: {heading: [(caption, wave (time,)), ...]}, to see and hear.
    """
    body = ["<div style='overflow-x: auto' tabindex='0' role='region' aria-label='Figures'><table>"]
    for index, (name, *cells) in enumerate(lines):
        tag = "td" if index else "th"
        columns = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        body.append(f"<tr><th scope='row'>{html.escape(name)}</th>{columns}</tr>")
    body = [*body, "</table></div>"] if lines else []
    body.extend(pictures)
    body.append(f"<p>Spectrograms: up to {sample_rate / 2:g} Hz; bright is loud (70 dB).</p>")
    for heading, clips in groups.items():
        body.append(f"<h2>{html.escape(heading)}</h2><div class='clips'>")
        for caption, wave in clips:
            window = torch.hann_window(254)
            power = torch.stft(wave, 254, 127, window=window, return_complex=True).abs().square()
            level = 10 * (power / 64**2).clamp_min(1e-9).log10()  # dB; a full-scale sine has 0
            pixels = ((level + 70) * 255 / 70).clamp(0, 255).flip(0).byte().numpy()
            data = base64.b64encode(pixels.tobytes()).decode()
            sound = base64.b64encode(wav_bytes(wave, sample_rate)).decode()
            name = html.escape(f"{heading}, {caption}")
            body.append(
                f"<figure><figcaption>{html.escape(caption)}</figcaption><canvas role='img'"
                f" aria-label='Spectrogram: {name}' width='{pixels.shape[1]}'"
                f" height='{pixels.shape[0]}' data-pixels='{data}'></canvas><audio controls"
                f" aria-label='{name}' src='data:audio/wav;base64,{sound}'></audio></figure>"
            )
        body.append("</div>")
    return PAGE % {"title": html.escape(title), "intro": html.escape(intro), "body": "".join(body)}

def report(world, title, note, rows, variance, clips):
    """What `presto.py eval` found, as text and as an HTML page. rows: those of `table`.

    variance: {model: [(sigma, ratio), ...]}. clips: {name: waves}; waves[label] is of that class.
    """
    lines = table(rows)
    heading = "Variance of answers within a class over that of real latents, by the input's sigma"
    text = [title, note, "", aligned(lines), "", f"{heading}; students should be at 1:"]
    for model, points in variance.items():
        text.append(f"{model:9}" + "".join(f"  {s:.3g}: {ratio:.2f}" for s, ratio in points))
    quality = {model: [] for model in variance}  # of (time, fd, steps), without rows of w = 1
    for name, row in sorted(rows.items(), key=lambda item: item[1].get("batch", 0)):
        model, *settings = name.split(", ")  # such as "teacher", ["16 steps", "w = 2"]
        if "batch" in row and settings[1:] != ["w = 1"]:
            point = (1 / row["batch"], row["fd"], settings[0].split()[0])
            quality.setdefault(model, []).append(point)  # from slow to fast
    pictures = [line_plot(heading, "sigma", "ratio; students should be at 1", variance, log_x=True),
                line_plot("Quality against time, by steps", "time per clip in batches (teacher: 1)",
                          "fd", quality, log_x=True, log_y=True)]
    groups = {}
    for label in range(0, len(world.PROMPTS), len(world.PROMPTS) // 4 + 1):  # four at most
        groups[world.PROMPTS[label]] = [(name, waves[label]) for name, waves in clips.items()]
    return "\n".join(text), page(title, note, lines, pictures, groups, world.SAMPLE_RATE)
