"""Sizes of pages, for those who count memory without touching it."""

PAGE = 16  # entries


def pages_for(entries: int) -> int:
    return -(-entries // PAGE)
