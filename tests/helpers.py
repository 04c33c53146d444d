"""What several test files need."""


class NoMask(dict):
    "A batch that raises as soon as anybody asks for its mask, or whether it has one"
    def __getitem__(self, key):
        assert key not in ("mask", "tags"), f"'{key}' of an unlabelled image was read"
        return super().__getitem__(key)

    def get(self, key, default=None): return self[key] if key in self else default

    def __contains__(self, key):
        assert key not in ("mask", "tags"), f"'{key}' of an unlabelled image was looked for"
        return super().__contains__(key)
