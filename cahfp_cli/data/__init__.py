"""Data specs to arrays: named sets, idx and npz files, folders of images, factories. No torch here."""
