"""The selectors of visual tokens, one file each."""
