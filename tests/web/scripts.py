"""What the two models of these tests say, cut into pieces as a scripted model needs them: none occurs twice."""

from __future__ import annotations

from porcelet.chat import builtin

# V3.1's way: the request decides whether the model thinks, so each effort can be chosen.
TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{%- if message.role == "user" %}<｜User｜>{{ message.content }}
{%- else %}<｜Assistant｜></think>{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<｜Assistant｜>{{ "<think>" if thinking else "</think>" }}{% endif %}"""
LENGTH = 20  # letters of a piece, at least: long ones make the tests short
THINKING = """The user asks about the colour of the sky. First what scattering is, then why the wavelength matters.

Rayleigh's law: intensity goes as $\\lambda^{-4}$. Violet scatters more still, but the eye hardly sees it.

- say what molecules do
- one formula, a table, some code
"""
ANSWER = """Sunlight holds every colour, and air treats them unequally. Molecules scatter it by **Rayleigh's law**.

## The law in one line

The intensity scattered by a sphere of diameter $d$ and index $n$ is

$$
I = I_0 \\frac{1 + \\cos^2\\theta}{2R^2} \\left(\\frac{2\\pi}{\\lambda}\\right)^4
    \\left(\\frac{n^2 - 1}{n^2 + 2}\\right)^2 \\left(\\frac{d}{2}\\right)^6
$$

What matters is \\(\\lambda^{-4}\\). A lamp that costs $5 and one for $10 show the same effect.

| Colour | Wavelength | Scattered, relative to red |
|:-------|-----------:|---------------------------:|
| Red    | 700 nm     | 1.0 |
| Green  | 530 nm     | 3.0 |
| Blue   | 450 nm     | 5.9 |
| Violet | 400 nm     | 9.4 |

1. Blue light is sent in all directions, so it reaches you from the whole sky.
2. Red light goes nearly straight through:
   - violet is scattered more still,
   - but the eye sees it poorly.

> The sky is not blue because it reflects the sea.

```python
def scattered(wavelength: float, reference: float = 700e-9) -> float:
    \"\"\"Rayleigh scattering relative to a reference wavelength, both in metres, as the fourth power of it.\"\"\"
    return (reference / wavelength) ** 4
```

Use `scattered(450e-9)`, or read [the paper](https://example.org/paper), ![a picture](https://example.org/x.png)
or <b>this</b> and [that](javascript:alert(1)).

\\[ \\frac{I_{450}}{I_{700}} = \\left(\\frac{700}{450}\\right)^4 \\approx 5.9 \\]

That is all the sky needs."""


def pieces(text: str, used: set[str]) -> list[str]:
    """Cut a text into pieces of some letters, each unlike all `used` before it."""
    found, piece = [], ""
    for character in text:
        piece += character
        if len(piece) >= LENGTH and piece not in used and not piece.isspace():
            found.append(piece)
            used.add(piece)
            piece = ""
    assert piece not in used
    return [*found, piece] if piece else found


_used: set[str] = set()
WRITER = [[builtin.THINK, *pieces(THINKING, _used), builtin.END_THINK, *pieces(ANSWER, _used)]]
ENDLESS = [[builtin.THINK, "hm", " well", " so", "hm"], [builtin.END_THINK, " tick", " tock", " tick"]]
