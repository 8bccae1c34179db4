"""Images on disk to batches on a device.

- `build`: `build_splits`, `build_train_loader`, `build_eval_loader`: from the configuration.
- `records`: `Sample`, `DatasetSplits`, `Batch`: the records that all other modules use.
- `registry`: `DATASETS`, `load_splits`: data sets by name.
- `desensitize`: `DESENSITIZERS`, `Desensitizer`, `make_desensitizer`: mosaic, blur, noise.
- `images`: `read_rgb`, `resize`: image files to pixels.
- `store`: `ResidentPixels`, `StreamedPixels`: decoded images, kept or read in time.
- `samplers`: `IdentitySampler`: P identities with K images each.
- `transforms`: `Augmentation`: the same augmentation for raw and desensitized images.
- `loaders`: `TrainLoader`, `EvalLoader`: batches.
- `splits`, `train_split`: validation splits.
- `checks`, `problems`: mistakes in data sets, and how to see them.

`datasets` contains one module for each data set; `people` draws the synthetic one.
"""
