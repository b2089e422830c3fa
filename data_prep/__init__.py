"""Data before training: manifests that name clips and their questions, checked before anything is decoded."""
