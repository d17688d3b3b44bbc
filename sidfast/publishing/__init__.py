"""What a finished generator becomes: a diffusers pipeline that anyone can load."""
