"""The trained networks as files that run without this project, compared before they are kept."""
