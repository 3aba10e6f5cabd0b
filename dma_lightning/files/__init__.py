"""Files of any kind: written whole, locked, checked, and read as if a stranger had written them.

- `atomic`: written beside their place, and moved there when they are on the disk
- `locks`: one process at a time in a folder
- `reading`: JSON and values of given types; errors that name the file
- `sha256_sums`: the checksums of a folder's files
- `zip_checksums`: the checksums that a checkpoint's archive carries
"""
