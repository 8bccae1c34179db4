"""The synthetic data set: people, streets and cameras drawn by code. No real person is shown.

- `photograph`: `draw_walks`: writes all images; `photograph`: draws one image.
- `appearance`: `draw_people`: body, hair and clothes of each person.
- `cameras`: `build_camera`: viewpoint, light, colors and optics.
- `figure`, `fabrics`, `skeleton`, `raster`, `scenery`: shapes, textures, poses and background.
"""
