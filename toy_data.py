"""A small world of tones whose truth is known: the data, and the ears, of presto.py.

Text-to-music needs a data set, a text encoder, and listeners. This file replaces all three with
something that runs anywhere and can be checked:

1. making tones    `make_batch` draws (waveform, label) pairs from a seeded generator, without end
2. naming them     `A3 saw` is what the text prompt is in the paper: `parse_prompt`
3. listening       `listen` estimates pitch, timbre and envelope from a waveform alone
4. scoring         `score` compares a set of clips with real ones: Frechet distance, MMD, coverage, ...
5. showing         `page` makes one HTML file to hear and see clips

Nothing here knows about diffusion, and nothing in presto.py looks at how a tone was made.
"""

import base64
import difflib
import html
import io
import math

import soundfile
import torch

SAMPLE_RATE = 8000                                   # hertz
CLIP_SAMPLES = 8192                                  # a power of two suits every stride and FFT
CLIP_SECONDS = CLIP_SAMPLES / SAMPLE_RATE            # 1.024
PITCHES = ["A3", "A#3", "B3", "C4", "C#4", "D4", "D#4", "E4", "F4", "F#4", "G4", "G#4"]
PITCH_HZ = 220.0 * 2.0 ** (torch.arange(12) / 12)    # A3 to G#4: one octave, so no tone is another's overtone
TIMBRES = ["sine", "organ", "square", "saw"]
NUM_CLASSES = len(PITCHES) * len(TIMBRES)            # 48; the label is pitch_index * 4 + timbre_index
NULL_LABEL = NUM_CLASSES                             # "no condition", for classifier-free guidance
PROMPTS = [f"{p} {t}" for p in PITCHES for t in TIMBRES]

# ------------------------------------------------------------------------------------------------
# 1. Making tones
# ------------------------------------------------------------------------------------------------
# The four timbres are the four answers to two questions that an ear (and `listen`) can decide:
#                      no third harmonic      third harmonic
#   no second harmonic       sine                square
#   second harmonic          organ                saw
NUM_HARMONICS = 6                                    # 6 x 415 Hz = 2.5 kHz, well under the Nyquist frequency, 4 kHz
_k = torch.arange(1, NUM_HARMONICS + 1, dtype=torch.float32)
HARMONICS = torch.stack([
    (_k == 1).float(),                                        # sine:   the fundamental alone
    (_k == 1) + 0.6 * (_k == 2) + 0.3 * (_k == 4),             # organ:  octaves
    (_k % 2 == 1) * _k**-0.8,                                 # square: odd harmonics
    _k**-0.8,                                                 # saw:    all harmonics
])                                                            # (timbre, harmonic)


def make_batch(count, generator=None, labels=None):
    """Draw `count` tones. Returns waveforms (count, CLIP_SAMPLES) in [-1, 1] and labels (count,).

    Labels are uniform over the 48 classes unless given. Within a class seven factors vary, so that a
    model which only learnt the class mean is found out: loudness, attack, decay, brightness, detune,
    vibrato depth and vibrato rate. The oscillator restarts at the note's onset, as a synthesizer's
    does. `generator` is a CPU torch.Generator; without one the (seeded) global one is used.
    """
    if labels is None:
        labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    u = torch.rand(7, count, 1, generator=generator)
    loudness = 0.10 * 3.5 ** u[0]                    # RMS at full level, 0.10 to 0.35: an 11 dB range
    attack = 0.005 * 20.0 ** u[1]                    # seconds, 5 to 100 ms
    decay = 0.12 * 6.0 ** u[2]                       # seconds to fall by 1/e, 0.12 to 0.72
    tilt = 0.6 * u[3]                                # brightness: harmonic k is weakened by k^-tilt
    detune = 8 * u[4] - 4                            # cents
    depth = 12 * u[5]                                # vibrato depth, cents
    rate = 4 + 3 * u[6]                              # vibrato rate, hertz

    t = torch.arange(CLIP_SAMPLES) / SAMPLE_RATE     # (time,) in seconds
    frequency = PITCH_HZ[labels // len(TIMBRES)][:, None] * 2.0 ** (detune / 1200)
    # The phase is the integral of f * (1 + r*sin(2 pi rate t)), with r the vibrato's relative depth.
    relative = depth * (math.log(2) / 1200)
    vibrato = relative * (1 - torch.cos(2 * math.pi * rate * t)) / (2 * math.pi * rate)
    phase = 2 * math.pi * frequency * (t + vibrato)  # (count, time)

    amplitude = HARMONICS[labels % len(TIMBRES)] * _k ** -tilt               # (count, harmonic)
    amplitude = amplitude / amplitude.square().sum(1, keepdim=True).sqrt() * math.sqrt(2)
    # sin((k+1)p) = 2 cos(p) sin(kp) - sin((k-1)p): six harmonics for the price of one sine and cosine.
    previous, current, twice_cosine = torch.zeros_like(phase), phase.sin(), 2 * phase.cos()
    wave = amplitude[:, :1] * current
    for k in range(1, NUM_HARMONICS):
        previous, current = current, twice_cosine * current - previous
        wave = wave + amplitude[:, k : k + 1] * current
    envelope = (1 - torch.exp(-3 * t / attack)) * torch.exp(-t / decay)
    return loudness * envelope * wave, labels


# ------------------------------------------------------------------------------------------------
# 2. Naming them
# ------------------------------------------------------------------------------------------------


def parse_prompt(text):
    """"A3 saw" -> [its label]; "all" -> every label. Case and spacing are free. ValueError says what is possible."""
    wanted = " ".join(text.split()).lower()
    if wanted == "all":
        return list(range(NUM_CLASSES))
    known = [p.lower() for p in PROMPTS]
    if wanted in known:
        return [known.index(wanted)]
    # "saw A3" means A3 saw: compare with the words sorted too.
    tidy = lambda s: " ".join(sorted(s.split()))
    near = difflib.get_close_matches(tidy(wanted[:40]), [tidy(p) for p in known], 1, 0.6)
    guess = f"did you mean {PROMPTS[[tidy(p) for p in known].index(near[0])]}? " if near else ""
    raise ValueError(f"unknown prompt {text[:40]!r}: {guess}A prompt is a pitch ({', '.join(PITCHES)}) and a timbre "
                     f"({', '.join(TIMBRES)}), such as \"A3 saw\", or all")


def describe(heard):
    """What `listen` heard in a batch of one, as a prompt; "noise" where there is no tone."""
    if heard["tonal"].item() <= 0.5:
        return "noise"
    return f"{PITCHES[heard['pitch'].item()]} {TIMBRES[heard['timbre'].item()]}"


def wav_bytes(wave):
    """A mono waveform (time,) in [-1, 1] as a WAV file's bytes, PCM 16."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave.numpy(), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------
# 3. Listening
# ------------------------------------------------------------------------------------------------
ENVELOPE_FRAMES = 64                                 # frames of 128 samples, 16 ms


def listen(wave):
    """Hear a batch of clips (batch, time) and say what is there; nothing but the waveform is used.

    Returns a dict of tensors (batch,): `hz`; `pitch`, the nearest pitch's index; `cents`, the distance
    to it; `timbre`, an index into TIMBRES; `tonal`, the share of the energy that lies on the pitch's
    harmonics (1 for a clean tone, near 0.1 for noise); `loudness` (dB of the loudest 16 ms), `attack`
    (seconds to 80 % of the peak), `decay` (dB per second after the peak), `brightness` (energy above
    the third harmonic, as a share).
    """
    wave = wave.float().cpu()
    window = torch.hann_window(wave.shape[-1])
    power = torch.fft.rfft(wave * window).abs().square()             # (batch, bin)
    bin_hz = SAMPLE_RATE / wave.shape[-1]
    hz_of_bin = torch.arange(power.shape[-1]) * bin_hz
    total = torch.cat([torch.zeros_like(power[:, :1]), power.cumsum(-1, dtype=torch.float64).float()], -1)

    def energy_between(low, high):                   # power in [low, high) hertz, a difference of running sums
        index = lambda hz: (hz / bin_hz).round().long().clamp(0, power.shape[-1])
        return total.gather(1, index(high)) - total.gather(1, index(low))

    # Pitch: in every timbre the fundamental is the strongest harmonic, and the pitches span less than an
    # octave: the loudest bin in that octave. Then the centroid around it, which vibrato does not shift.
    in_octave = (hz_of_bin > 208) & (hz_of_bin < 430)
    peak_hz = hz_of_bin[(power * in_octave).argmax(-1)][:, None]
    near = power * ((hz_of_bin - peak_hz).abs() < 14)
    hz = (near * hz_of_bin).sum(-1) / near.sum(-1).clamp_min(1e-20)
    semitones = 12 * torch.log2(hz.clamp_min(1.0) / PITCH_HZ[0])
    pitch = semitones.round().clamp(0, len(PITCHES) - 1)

    # Timbre: amplitudes of the harmonics, each gathered within 3 % of its frequency.
    centres = hz[:, None] * _k                                       # (batch, harmonic)
    harmonic = energy_between(centres * 0.97, centres * 1.03).clamp_min(0)
    ratio = (harmonic / harmonic[:, :1].clamp_min(1e-20)).sqrt()
    timbre = (ratio[:, 1] > 0.18).long() + 2 * (ratio[:, 2] > 0.10).long()   # half of the weakest real one

    frames = wave.unflatten(-1, (ENVELOPE_FRAMES, -1)).square().mean(-1).clamp_min(1e-10)   # (batch, frame)
    level = 10 * frames.log10()                                      # dB
    seconds = torch.arange(ENVELOPE_FRAMES) * (wave.shape[-1] / ENVELOPE_FRAMES / SAMPLE_RATE)
    top, top_frame = level.max(-1)
    attack = seconds[(level > top[:, None] - 1.94).int().argmax(-1)]
    after = ((torch.arange(ENVELOPE_FRAMES) >= top_frame[:, None]) & (level > top[:, None] - 30)).float()
    weight = after / after.sum(-1, keepdim=True)
    s, l = seconds - (weight * seconds).sum(-1, keepdim=True), level - (weight * level).sum(-1, keepdim=True)
    slope = (weight * s * l).sum(-1) / (weight * s * s).sum(-1).clamp_min(1e-9)

    return dict(
        hz=hz, pitch=pitch.long(), cents=100 * (semitones - pitch), timbre=timbre,
        tonal=harmonic.sum(-1) / power.sum(-1).clamp_min(1e-20),
        loudness=top, attack=attack, decay=-slope,
        brightness=harmonic[:, 3:].sum(-1) / harmonic.sum(-1).clamp_min(1e-20),
    )


def is_right(heard, labels):
    """Which clips are what was asked: pitch within 50 cents, timbre equal, mostly tone. Booleans (batch,).

    Returns (both, pitch, timbre). "Mostly tone" (tonal > 0.5) keeps noise from being right by luck.
    """
    labels = labels.cpu()
    tone = heard["tonal"] > 0.5
    pitch = tone & (heard["pitch"] == labels // len(TIMBRES)) & (heard["cents"].abs() <= 50)
    timbre = tone & (heard["timbre"] == labels % len(TIMBRES))
    return pitch & timbre, pitch, timbre


# ------------------------------------------------------------------------------------------------
# 4. Scoring: how far one set of clips is from another
# ------------------------------------------------------------------------------------------------
# The paper embeds music with networks that must be downloaded (for FAD, MMD, the CLAP score). Tones need
# no such ears. The embedding here is the log energy in 24 bands a third of an octave or less wide, in each
# of two parts of the clip: bands see pitch region, timbre and brightness, the parts see attack and decay.
# It does not see single semitones, nor phase: `is_right` sees the former, and an ear hears neither phase.
EMBEDDING_BANDS = 24
EMBEDDING_FLOOR = 1e-4                               # of a full-scale sine's power, -40 dB: fainter counts as silence


def embed(wave):
    """Waveforms (batch, time) -> embeddings (batch, 48): log10 band energies, early and late."""
    wave = wave.float().cpu()
    spectrum = torch.stft(wave, 512, 256, window=torch.hann_window(512), return_complex=True, center=False)
    power = spectrum.abs().square() / (512 / 4) ** 2                 # a full-scale sine peaks at 1
    hz = torch.arange(257) * (SAMPLE_RATE / 512)
    mel = 2595 * torch.log10(1 + hz / 700)                           # the mel scale: narrow bands where pitch lives
    centres = torch.linspace(mel[10], mel[-1], EMBEDDING_BANDS)
    bank = (1 - (mel - centres[:, None]).abs() / (centres[1] - centres[0])).clamp_min(0)   # triangles (band, bin)
    energy = bank @ power                                            # (batch, band, frame)
    early, late = energy[..., :10].mean(-1), energy[..., 10:].mean(-1)   # the first 0.3 seconds, and the rest
    return (torch.cat([early, late], -1) + EMBEDDING_FLOOR).log10()


def frechet_distance(a, b):
    """Frechet distance of two embedded sets (n, d), (m, d): |mean gap|^2 + tr(A + B - 2 (AB)^(1/2)).

    As in FID and FAD, of Gaussians fitted to the sets. Biased upward by about d^2 / n: compare equal n.
    """
    a, b = a.double(), b.double()
    A, B = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T          # A^(1/2): AB has the eigenvalues of root B root
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross).item()


def mmd(a, b):
    """Squared maximum mean discrepancy, unbiased, times 1000 (so it may fall a little below zero).

    Gaussian kernel (Gretton et al. 2012), whose width is the median distance within b, the reference.
    """
    a, b = a.double(), b.double()
    width = torch.pdist(b).median()
    kernel = lambda x, y: (-torch.cdist(x, y).square() / (2 * width**2)).exp()
    off_diagonal = lambda k: (k.sum() - k.trace()) / (len(k) * (len(k) - 1))
    return 1000 * (off_diagonal(kernel(a, a)) + off_diagonal(kernel(b, b)) - 2 * kernel(a, b).mean()).item()


def density_recall_coverage(fake, real, k=5):
    """How real the fakes are, and how much of the real they reach: three figures from k nearest neighbours.

    Density and coverage (Naeem et al. 2020): into how many real points' neighbourhoods a fake falls, over k;
    the share of real points whose neighbourhood holds a fake. Recall (Kynkaanniemi et al. 2019): the share of
    real points that lie in some fake's neighbourhood. A point's neighbourhood reaches to its k-th neighbour.
    """
    distance = torch.cdist(real, fake)                               # (real, fake)
    radius = lambda x: torch.cdist(x, x).kthvalue(k + 1, dim=1).values   # k + 1, for the first is the point itself
    near_real = distance < radius(real)[:, None]
    near_fake = distance < radius(fake)[None, :]
    return (near_real.float().sum(0).mean().item() / k, near_fake.any(1).float().mean().item(),
            near_real.any(1).float().mean().item())


def score(wave, label, reference):
    """All figures of one set of clips against `reference`, the embeddings of as many real ones."""
    heard = listen(wave)
    right, pitch, timbre = (x.float().mean().item() for x in is_right(heard, label))
    embedded = embed(wave)
    density, coverage, recall = density_recall_coverage(embedded, reference)
    return dict(fd=frechet_distance(embedded, reference), mmd=mmd(embedded, reference), right=right, pitch=pitch,
                timbre=timbre, density=density, recall=recall, coverage=coverage, loudness=heard["loudness"].mean().item())


# ------------------------------------------------------------------------------------------------
# 5. Showing: one HTML file to hear and see clips, which needs nothing else
# ------------------------------------------------------------------------------------------------
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>%(title)s</title>
<style>
:root { color-scheme: light dark }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 76rem; margin: auto; padding: 1rem }
.table { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #8886 }
th:first-child { text-align: left; position: sticky; left: 0; background: Canvas }
@media (max-width: 40rem) { th:first-child { white-space: normal; min-width: 7rem } }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem }
figure { margin: 0 } canvas, audio { width: 100%%; display: block }
canvas { height: 7rem; image-rendering: pixelated; border-radius: .3rem } audio { height: 2.5rem; margin-top: .3rem }
</style>
<h1>%(title)s</h1><p>%(intro)s</p>%(table)s
<p>Spectrograms: time to the right, 1.02 seconds; frequency upward, 0 to 4 kHz; brighter is louder, over 70 dB.</p>
%(clips)s
<script>
for (const canvas of document.querySelectorAll("canvas")) {   // one byte a pixel, row by row from the top
  const bytes = atob(canvas.dataset.pixels), picture = canvas.getContext("2d");
  const image = picture.createImageData(canvas.width, canvas.height);
  for (let i = 0; i < bytes.length; i++) {
    const v = bytes.charCodeAt(i);
    image.data.set([Math.min(255, 2 * v), Math.max(0, 2 * v - 200), 60 + v / 3, 255], 4 * i);
  }
  picture.putImageData(image, 0, 0);
}
</script></html>
"""


COLUMNS = dict(fd=".3f", mmd=".2f", right=".3f", pitch=".3f", timbre=".3f", density=".2f", recall=".2f", coverage=".2f", loudness=".1f",
               passes=".0f", blocks=".1f", network_ms=".1f", decoder_ms=".1f", real_time=".0f", speedup=".1f", batch_ms=".2f")


def table(rows):
    """{title: {column: figure}} -> lines of strings, the names of COLUMNS first; a figure that a row lacks is ""."""
    return [["", *COLUMNS]] + [[title, *(format(row[c], f) if c in row else "" for c, f in COLUMNS.items())] for title, row in rows.items()]


def aligned(lines):
    """A table's lines as text in columns, for a terminal."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(line[0].ljust(widths[0]) + "".join(c.rjust(w + 2) for c, w in zip(line[1:], widths[1:])) for line in lines)


def page(title, intro, lines, groups):
    """A self-contained HTML page. lines: those of `table`, or none; groups: {heading: [(caption, wave)]}."""
    cells = lambda tag, row: "<tr><th scope='row'>%s</th>" % html.escape(row[0]) + "".join(
        f"<{tag}>{html.escape(x)}</{tag}>" for x in row[1:]) + "</tr>"
    figures = "<div class='table' tabindex='0' role='region' aria-label='Table of figures'><table>%s%s</table></div>" % (
        cells("th", lines[0]), "".join(cells("td", row) for row in lines[1:])) if lines else ""
    clips = []
    for heading, sounds in groups.items():
        clips.append(f"<h2>{html.escape(heading)}</h2><div class='clips'>")
        for caption, wave in sounds:
            power = torch.stft(wave, 254, 127, window=torch.hann_window(254), return_complex=True).abs().square() / 64**2
            pixels = ((10 * power.clamp_min(1e-9).log10() + 70) * 255 / 70).clamp(0, 255).flip(0).byte().contiguous()
            encode = lambda data: base64.b64encode(data).decode()
            name = html.escape(f"{heading}, {caption}", quote=True)
            clips.append(
                f"<figure><figcaption>{html.escape(caption)}</figcaption>"
                f"<canvas role='img' aria-label='Spectrogram: {name}' width='{pixels.shape[1]}' height='{pixels.shape[0]}' "
                f"data-pixels='{encode(pixels.numpy().tobytes())}'></canvas>"
                f"<audio controls aria-label='{name}' src='data:audio/wav;base64,{encode(wav_bytes(wave))}'></audio></figure>")
        clips.append("</div>")
    return PAGE % dict(title=html.escape(title), intro=html.escape(intro), table=figures, clips="\n".join(clips))
