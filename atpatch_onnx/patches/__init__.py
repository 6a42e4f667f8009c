"""The fitted thing: what a patch is, its file, several as one."""
