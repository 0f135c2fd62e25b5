"""Raw videos to checked clips, stage by stage."""
