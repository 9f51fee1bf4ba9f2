"""DICOM: series of images with their place in the patient, PET in units, and results written back as a new series."""
