"""What a program can be compiled for: slices of TPUs, or one NVIDIA GPU."""

from saber_jax.aot import cards, chips

Target = chips.Slices | cards.Card


def parse(name: str) -> Target:
    """ "h100", "v5e:16x16", or "2*v5e:16x16" for two slices.

    Raises ValueError that lists what there is.
    """
    if name in cards.CARDS:
        return cards.CARDS[name]
    try:
        return chips.parse_topology(name)
    except ValueError as error:
        raise ValueError(f"{error}\nor one GPU: {', '.join(cards.CARDS)}") from error
