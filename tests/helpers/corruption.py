"""Damaged files."""


def other_byte(chance, content, end):
    """The content with one of its first bytes replaced by another."""
    place = chance.randrange(end)
    return content[:place] + bytes([content[place] ^ chance.randrange(1, 256)]) + content[place + 1 :]
