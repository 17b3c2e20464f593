for (const head of document.querySelectorAll('th[data-sorts]')) head.addEventListener('click', () => {
  const column = Number(head.dataset.sorts), body = head.closest('table').tBodies[0];
  const up = head.getAttribute('aria-sort') === 'descending';
  for (const other of head.closest('thead').querySelectorAll('th')) other.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const value = row => row.cells[column].dataset.value ?? '';
  const rank = (a, b) => (a === '') - (b === '') || (up ? 1 : -1) *
    (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  [...body.rows].sort((a, b) => rank(value(a), value(b))).forEach(row => body.append(row));
});
