"""Stage one: the teacher labels every client's images, once, into label stores."""
