// The messages of one conversation: a tree, because an edited question or a regenerated answer is a new branch. What is
// shown is the path from the root to the leaf.

export function createTree(messages = [], leaf = null) {
  const byId = new Map(messages.map((message) => [message.id, message]));

  const childrenOf = (id) => [...byId.values()].filter((message) => message.parent === id);

  return {
    get leaf() {
      return leaf;
    },
    get: (id) => byId.get(id),

    /** Add a message or replace it by its newer state. */
    put(message) {
      byId.set(message.id, message);
    },

    select(id) {
      leaf = id;
    },

    /** The messages shown, first to last. */
    path() {
      const path = [];
      for (let message = byId.get(leaf); message; message = byId.get(message.parent)) path.unshift(message);
      return path;
    },

    /** All versions of a message: those with its parent and role, oldest first. */
    versions(message) {
      return childrenOf(message.parent).filter((other) => other.role === message.role);
    },

    /** The end of the newest branch through a message. */
    newestLeaf(id) {
      const newest = childrenOf(id).at(-1);
      return newest ? this.newestLeaf(newest.id) : id;
    },
  };
}
