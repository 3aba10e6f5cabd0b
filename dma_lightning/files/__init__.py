"""Files of any kind: written whole, locked, checked, and read as untrusted input.

- `atomic`: writes to a temporary file and renames it once it is on disk
- `locks`: allows one process at a time in a folder
- `reading`: reads JSON and typed values; every error names the file
- `sha256_sums`: writes and checks the hashes of a folder's files
- `zip_checksums`: checks the checksums inside a checkpoint's archive
"""
