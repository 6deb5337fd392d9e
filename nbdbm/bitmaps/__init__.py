"""The bitmaps: dirty bits and their life, pure."""
