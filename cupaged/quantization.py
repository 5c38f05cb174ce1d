"""What FlashInfer's module of this name has for masks."""

from cupaged.masks import packbits, segment_packbits

__all__ = ["packbits", "segment_packbits"]
