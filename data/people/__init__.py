"""The synthetic data set: people, streets and cameras drawn by code. No real person is shown.

- `photograph`: `draw_walks`: writes all images; `photograph`: draws one image; `build_camera`:
  viewpoint, light, colors and optics.
- `appearance`: `draw_people`: body, hair and clothes of each person; textures.
- `figure`, `raster`, `scenery`: shapes and poses, drawing, background.
"""
