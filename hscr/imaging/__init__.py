"""Bytes to pixels: PNG, JPEG and DICOM become a bounded upright PNG, made by a named and digested recipe."""
