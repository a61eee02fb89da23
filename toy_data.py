"""A small world of tones whose truth is known: the data, and the ears, of presto.py.

Text-to-music needs a data set, a text encoder, and listeners. This file replaces all three with
something that runs anywhere and can be checked:

1. making tones    `make_batch` draws (waveform, label) pairs from a seeded generator, without end
2. naming them     `A3 saw` is what the text prompt is in the paper; `parse_prompt`, `prompt_name`
3. listening       `listen` estimates pitch, timbre and envelope from a waveform alone

Nothing here knows about diffusion, and nothing in presto.py looks at how a tone was made.
"""

import math

import torch

SAMPLE_RATE = 8000                                   # hertz
CLIP_SAMPLES = 8192                                  # 1.024 seconds: a power of two suits every stride and FFT
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
    (_k % 2 == 1) / _k,                                       # square: odd harmonics
    1 / _k,                                                   # saw:    all harmonics
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
    decay = 0.2 * 10.0 ** u[2]                       # seconds to fall by 1/e, 0.2 to 2
    tilt = 0.6 * u[3]                                # brightness: harmonic k is weakened by k^-tilt
    detune = 20 * u[4] - 10                          # cents
    depth = 20 * u[5]                                # vibrato depth, cents
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
# 2. Listening
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
    timbre = (ratio[:, 1] > 0.15).long() + 2 * (ratio[:, 2] > 0.08).long()   # half of the weakest real one

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
