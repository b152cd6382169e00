"""What lies in a store, whether or not a row names it."""

from hscr.store.store import Store


def images_in(store: Store) -> set[str]:
    """The digests of all single blobs."""
    return {digest for number in range(256) for digest in store.blobs.stored(f"{number:02x}")}
