"""Data before training: read, convert, check and decode manifests of clips and questions (`README.md`)."""
